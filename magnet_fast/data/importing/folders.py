"""Folders `images` and `masks`: a mask is called as its picture and, behind two underscores, its sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from magnet_fast.data.importing.drawings import mask_file
from magnet_fast.data.importing.record import Problems, Record

BETWEEN = "__"


def read_folders(path: Path, images: Path, problems: Problems) -> Iterator[Record]:
    """The masks in `masks` and the folders in it: `masks/cat01__the_black_cat.png` is of `images/cat01.jpg`.

    Single underscores of the sentence stand for spaces. Files whose names begin with a dot, or end in no picture
    format, are left alone.

    Args:
        path: the folder.
        images: the folder of the pictures, `images` in it unless another is meant.
        problems: of single masks; gathered while records are taken.

    Raises ValueError where there are no masks.
    """
    masks = path / "masks"
    if not masks.is_dir():
        raise ValueError(f"{path}: expected the folders images and masks, got {_inside(path)}")
    pictures: dict[str, list[str]] = {}
    for name in _pictures_in(images):
        pictures.setdefault(os.path.splitext(name)[0], []).append(name)
    for name in _pictures_in(masks):
        where = f"mask {name}"
        with problems.at(where):
            stem = os.path.splitext(name)[0]
            picture, sentence = _parted(stem, pictures)
            if len(pictures[picture]) > 1:
                raise ValueError(f"image is {' or '.join(pictures[picture])}; expected one picture of that name")
            yield Record(where, (pictures[picture][0],), mask_file(masks / name), (sentence.replace("_", " "),))


def _parted(stem: str, pictures: dict[str, list[str]]) -> tuple[str, str]:
    """A mask's name as the name of a picture, which may hold two underscores itself, and a sentence."""
    if stem in pictures or BETWEEN not in os.path.basename(stem):
        raise ValueError(
            f"name is without a sentence; expected {os.path.basename(stem)}{BETWEEN}the_words.png, or a table that "
            "gives each mask its sentences"
        )
    parts = stem.split(BETWEEN)
    for count in range(len(parts) - 1, 0, -1):
        picture = BETWEEN.join(parts[:count])
        if picture in pictures:
            return picture, BETWEEN.join(parts[count:])
    raise ValueError(f"image is {parts[0]!r} with any ending; expected a picture of that name in images")


def _pictures_in(folder: Path) -> list[str]:
    """Names of all pictures in a folder and the folders in it, relative to it, in order."""
    Image.init()
    found = []
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [one for one in folders if not one.startswith(".")]
        below = os.path.relpath(place, folder)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in Image.EXTENSION:
                found.append(name if below == "." else f"{below}/{name}")
    return sorted(found)


def _inside(path: Path) -> str:
    names = sorted(os.listdir(path))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
