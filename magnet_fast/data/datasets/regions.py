"""Reader of regions named by commands (Talk2Car-RegSeg): "park next to the bus" is a piece of road, no object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from magnet_fast.data.datasets.base import (
    BaseReader,
    Folders,
    begins_with,
    choose_folders,
    find_file,
    one_sentence,
    picture_size,
    read_json,
    read_picture,
)
from magnet_fast.data.datasets.reader import Ref, Sentence
from magnet_fast.data.values import require, require_inside, shown

SPLITS = ("train", "val", "test")
_DIGITS = 18  # of an index, which travels as int64
IMAGE_FOLDERS = ("imgs", "new_images", "images")  # Talk2Car's, that of the split of short commands, a plain name
MASK_FOLDERS = ("mask_image_bin", "val_masks_new", "new_masks", "masks", ".")  # in use by the released code, then plain


class Regions(BaseReader):
    """Commands and the regions they name, checked as they are opened. A command is a ref with one sentence.

    Reads every JSON file of `<root>/<dataset>` that holds {split: {index: {"command", "img", ...}}}; other keys, such
    as Talk2Car's boxes, are not used. An index's mask is `gt_img_ann_<split>_<index>.png` in one of `MASK_FOLDERS`; the
    region is what is not black. `Ref.ref_id` and the annotation's id are the index, which is unique within its split;
    images are numbered in the order in which the commands name them.

    Left out and counted: commands without a mask file (a command may name nothing that can be drawn).

    Args:
        root, dataset: the folder is `<root>/<dataset>`.
        images: folder or folders of the images; else `IMAGE_FOLDERS` in `<root>/<dataset>`.

    Raises FileNotFoundError for absent files and folders; ValueError, naming file and record, for broken JSON, missing
    or wrong values, and a split that two files hold.
    """

    def __init__(
        self, root: str | os.PathLike[str], dataset: str = "talk2car", *, images: Folders | None = None
    ) -> None:
        folder = Path(root) / dataset
        files = command_files(folder)
        if not files:
            raise FileNotFoundError(f"{folder} holds no JSON file of the form {{split: {{index: {{command, img}}}}}}")
        super().__init__(folder if len(files) > 1 else next(iter(files)), SPLITS)
        self._image_folders: list[Path] = []
        with self._file():
            self._image_folders = choose_folders(root, images, [folder / name for name in IMAGE_FOLDERS])
        self._mask_folders = [folder / name for name in MASK_FOLDERS if (folder / name).is_dir()]
        self._masks = {
            entry.name: Path(entry.path)
            for place in reversed(self._mask_folders)  # the first folder's files last: they count
            for entry in os.scandir(place)
            if entry.name.startswith("gt_img_ann_")
        }
        self._image_names: list[str] = []
        numbers: dict[str, int] = {}
        origin: dict[str, Path] = {}
        for path, splits in files.items():
            for split, commands in splits.items():
                with self._file():
                    if split in origin:
                        raise ValueError(f"{path} holds split {split!r}, which {origin[split]} holds, too")
                    origin[split] = path
                    for index, record in commands.items():
                        with self._record():
                            self._read(path, split, index, record, numbers)
        self._sizes: dict[int, tuple[int, int]] = {}
        self._first = {ref.image_id: ref for refs in reversed(self._refs.values()) for ref in reversed(refs)}
        self._close()

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width of the mask drawn on the image, in pixels: the commands do not say the image's."""
        if image_id not in self._first:
            raise ValueError(f"image_id is {image_id!r}; {self.source} has {len(self._image_names)} images")
        if image_id not in self._sizes:
            self._sizes[image_id] = picture_size(self._mask_path(self._first[image_id]))
        return self._sizes[image_id]

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError naming the folders where it was looked for."""
        if image_id not in self._first:
            raise ValueError(f"image_id is {image_id!r}; {self.source} has {len(self._image_names)} images")
        return find_file(self._image_names[image_id], self._image_folders, "image")

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1. Raises ValueError naming a mask file that cannot be read."""
        path = self._mask_path(ref)
        mask = (read_picture(path, "L") > 0).astype(np.uint8)
        if mask.shape != self.image_size(ref.image_id):
            raise ValueError(
                f"{path} has {mask.shape[0]} x {mask.shape[1]} pixels (height x width); another mask of image "
                f"{self._image_names[ref.image_id]} has {' x '.join(map(str, self.image_size(ref.image_id)))}"
            )
        return mask

    def _mask_path(self, ref: Ref) -> Path:
        return self._masks[_mask_name(ref.split, ref.ref_id)]

    def _read(self, path: Path, split: str, index: str, record: Any, numbers: dict[str, int]) -> None:
        where = f"{path}: command {index} of {split}"
        if not (index.isascii() and index.isdigit() and str(int(index[:_DIGITS])) == index):
            raise ValueError(f"{where}: the index is {shown(index)}; expected a whole number from 0 as JSON writes it")
        require(record, {"command": str, "img": str}, where)
        name = require_inside(record["img"], where)
        if _mask_name(split, int(index)) not in self._masks:
            self.skipped.add("no mask file", f"{where}: {_mask_name(split, int(index))}")
            return
        if name not in numbers:
            numbers[name] = len(numbers)
            self._image_names.append(name)
        self._keep(
            Ref(
                ref_id=int(index),
                ann_ids=(int(index),),
                image_id=numbers[name],
                category_id=None,
                split=split,
                sentences=one_sentence(int(index), record["command"]),
            )
        )


def command_files(folder: Path) -> dict[Path, dict[str, dict[str, Any]]]:
    """JSON files of commands in a folder, with what they hold."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if not begins_with(path, "{"):
            continue
        content = read_json(path, unique=True)
        splits = list(content.values())
        if all(isinstance(split, dict) for split in splits) and any(map(_holds_commands, splits)):
            found[path] = content
    return found


def _holds_commands(split: dict[str, Any]) -> bool:
    first = next(iter(split.values()), None)
    return isinstance(first, dict) and ("command" in first or "img" in first)


def _mask_name(split: str, index: int) -> str:
    return f"gt_img_ann_{split}_{index}.png"
