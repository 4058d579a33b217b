"""Where a command is to write: looked at before anything is computed, so that an hour's work is not lost to a name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from magnet_fast.data import ExpressionDataset

Inputs = Mapping[str, str | Path | None]
"""What a command reads, by the name of its argument: files, folders or names of neither."""


def check_files(outputs: Mapping[str, Path | None], inputs: Inputs) -> None:
    """ValueError for a file that cannot be written where it is asked for, or that is one of the command's inputs or
    another of its outputs, by whatever name or link."""
    from magnet_fast.atomic import same_file

    given = {name: path for name, path in outputs.items() if path is not None}
    for name, path in given.items():
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a folder; expected the name of a file to write")
        _check_room(name, path.parent)
        for read, source in inputs.items():
            if source is not None and any(same_file(path, one) for one in _files(Path(source))):
                raise ValueError(f"{name}: {path} is what {read} names, and would be overwritten; name another file")
    for (one, path), (other, second) in combinations(given.items(), 2):
        if same_file(path, second):
            raise ValueError(f"{one} and {other}: {path} is named twice; expected two files")


def check_folder(name: str, folder: Path) -> None:
    """ValueError for a folder that cannot be made or written to."""
    _check_room(name, folder)


def check_not_of_the_data(path: Path | None, dataset: ExpressionDataset, split: str) -> None:
    """ValueError where a file to write is one of a data set's: its annotations, or a picture of the split."""
    from magnet_fast.atomic import same_file

    if path is None or not path.exists():
        return
    reader = dataset.reader
    pictures = (reader.image_path(image) for image in {ref.image_id for ref in reader.refs(split)})
    if same_file(path.parent, reader.source.parent) or any(same_file(path, one) for one in pictures):
        raise ValueError(f"--out: {path} is there, among the files of the data; name another file")


def _check_room(name: str, folder: Path) -> None:
    nearest = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))
    if not nearest.is_dir():
        raise ValueError(f"{name}: {nearest} is no folder; expected one to write in")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: the folder {nearest} may not be written to; name another one")


def _files(source: Path) -> Iterable[Path]:
    """A file itself, and what lies in a folder, not below."""
    return (source, *source.iterdir()) if source.is_dir() else (source,)
