"""Data sets on disk, a reader for each format, and `open_reader`, which tells the format from the files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from magnet_fast.data.datasets.base import Folders
from magnet_fast.data.datasets.complex_queries import ComplexQueries, query_files
from magnet_fast.data.datasets.phrasecut import IMAGE_RECORDS, PhraseCut, split_files
from magnet_fast.data.datasets.reader import Reader
from magnet_fast.data.datasets.refer import Refer
from magnet_fast.data.datasets.regions import Regions, command_files


class Format(NamedTuple):
    """A format of data sets.

    Attributes:
        files: what tells it, in words.
        told: whether a data set's folder has these files.
        open: its reader, from root, dataset, split_by and images.
    """

    files: str
    told: Callable[[Path], bool]
    open: Callable[[str | os.PathLike[str], str, str, Folders | None], Reader]


def _open_refer(root: str | os.PathLike[str], dataset: str, split_by: str, images: Folders | None) -> Reader:
    return Refer(root, dataset, split_by, images=images)


FORMATS: dict[str, Format] = {
    "refer": Format(
        "instances.json and refs(<split_by>).p or .json (grefs for gRefCOCO)",
        lambda folder: (folder / "instances.json").is_file() or any(folder.glob("*refs(*")),
        _open_refer,
    ),
    "phrasecut": Format(
        "image_data_split.json and refer_<split>.json",
        lambda folder: any((folder / name).is_file() for name in IMAGE_RECORDS) and bool(split_files(folder)),
        lambda root, dataset, split_by, images: PhraseCut(root, dataset, images=images),
    ),
    "complex_queries": Format(
        "a JSON list of {file_name, sentence, pan_seg_file, id}",
        lambda folder: bool(query_files(folder)),
        lambda root, dataset, split_by, images: ComplexQueries(root, dataset, images=images),
    ),
    "regions": Format(
        "a JSON dict {split: {index: {command, img}}}",
        lambda folder: bool(command_files(folder)),
        lambda root, dataset, split_by, images: Regions(root, dataset, images=images),
    ),
}
"""By name, in the order in which their files are looked for."""


def open_reader(
    root: str | os.PathLike[str],
    dataset: str,
    split_by: str = "unc",
    *,
    format: str | None = None,
    images: Folders | None = None,
) -> Reader:
    """The reader of the data set in `<root>/<dataset>`.

    Args:
        root: folder of data sets and, by default, of images.
        dataset: the data set's folder within.
        split_by: whose splits, in REFER's layout, which has files for each; the other formats have one and ignore it.
        format: one of `FORMATS`; told from the files if None.
        images: folder or folders of images; the field's usual places if None.

    Raises FileNotFoundError for an absent folder; ValueError for a format that is unknown or cannot be told, saying
    what was looked for; and what the reader itself raises.
    """
    folder = Path(root) / dataset
    if format is None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; expected the folder of a data set{_helps(Path(root))}")
        format = next((name for name, one in FORMATS.items() if one.told(folder)), None)
        if format is None:
            looked = "; ".join(f"{one.files} ({name})" for name, one in FORMATS.items())
            raise ValueError(
                f"{folder}: the format of the data cannot be told; it has none of: {looked}{_helps(Path(root))}"
            )
    elif format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[format].open(root, dataset, split_by, images)


def _helps(root: Path) -> str:
    """What a root without the data set asked for has in its place, or how one is made."""
    how = "--dataset (in training: --set data.dataset=NAME)"
    try:
        held = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and _told_soon(folder))
        if held:
            return f"; {root} holds {', '.join(held[:5])}{' and more' * (len(held) > 5)}: name one by {how}"
        if _told_soon(root):
            place = root.resolve()
            return f"; {root} is one itself: give {place.parent} as the data, and name {place.name} by {how}"
    except OSError:  # absent, or not to be looked into
        pass
    return "; `data import` makes one of your own pictures, `data scenes` one of drawn scenes"


def _told_soon(folder: Path) -> bool:
    """Whether a folder is a data set, of a format that is told without reading files, which may be large."""
    return any(FORMATS[name].told(folder) for name in ("refer", "phrasecut"))
