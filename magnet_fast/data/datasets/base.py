"""What readers have in common: refs by split, records left out, big JSON read record by record, folders, pictures."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from magnet_fast.data.datasets.reader import Ref, Sentence, Skipped

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Option `images`: one folder or several, looked through in order."""

_EXAMPLES = 3  # of the records left out for one reason that are named
_SPACE = re.compile(r"[ \t\r\n]*")


class BaseReader:
    """Refs in lists by split. A reader adds sizes, paths and masks, and calls `_close` when it has read everything.

    Attributes:
        source: the file that the refs come from, for messages; a folder where there are several.
        skipped: records left out.
    """

    def __init__(self, source: Path, customary: Sequence[str]) -> None:
        self.source, self.skipped = source, Skipped()
        self._customary = customary
        self._refs: dict[str, list[Ref]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, those of the field in their customary order, then the data's own."""
        own = [split for split in self._refs if split not in self._customary]
        return (*(split for split in self._customary if split in self._refs), *own)

    def refs(self, split: str) -> list[Ref]:
        """The refs of one split in file order. Raises ValueError for a split that the data do not name."""
        if split not in self._refs:
            raise ValueError(f"split is {split!r}; {self.source} has {', '.join(self.splits)}")
        return list(self._refs[split])

    def extra(self, ref: Ref, sentence: Sentence) -> dict[str, Tensor]:
        """Named tensors beside image and text: none."""
        return {}

    def _keep(self, ref: Ref) -> None:
        self._refs.setdefault(ref.split, []).append(ref)

    def _skip(self, reason: str, record: str) -> None:
        self.skipped.reasons[reason] = self.skipped.reasons.get(reason, 0) + 1
        examples = self.skipped.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(record)

    def _close(self) -> None:
        """Say what was left out; raise ValueError if nothing is left."""
        reasons = "; ".join(
            f"{count} records: {reason} ({', '.join(self.skipped.examples[reason])}{', ...' * (count > _EXAMPLES)})"
            for reason, count in self.skipped.reasons.items()
        )
        if not self._refs:
            raise ValueError(f"{self.source}: no record can be used{f'; left out {reasons}' if reasons else ''}")
        if reasons:
            warnings.warn(f"{self.source}: left out {reasons}", stacklevel=3)


def read_json(path: Path) -> Any:
    """A JSON file. Raises FileNotFoundError, or ValueError for what is no JSON, with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """The dicts of a JSON list, one after the other.

    A data set's polygons take gigabytes as Python's numbers; one at a time, only what is kept of them stays. Raises
    FileNotFoundError, or ValueError with path and place for what is no JSON, no list, or no dict within it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    place = _after_space(text, 0)
    if text[place : place + 1] != "[":
        raise ValueError(f"{path}: starts with {text[place : place + 20]!r}; expected a JSON list of records")
    decode, number = json.JSONDecoder().raw_decode, 0
    place = _after_space(text, place + 1)
    while text[place : place + 1] != "]":
        if number:
            if text[place : place + 1] != ",":
                raise ValueError(f"{path}: not valid JSON (after record {number - 1}, at character {place})")
            place = _after_space(text, place + 1)
        try:
            record, place = decode(text, place)
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON (record {number}: {error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {number} is a {type(record).__name__}; expected a dict")
        yield record
        number += 1
        place = _after_space(text, place)
    if _after_space(text, place + 1) != len(text):
        raise ValueError(f"{path}: not valid JSON (something follows the list, at character {place + 1})")


def require(record: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    """Raise ValueError unless a record has these keys with values of these kinds; text must not be blank."""
    for key, kind in kinds.items():
        if key not in record:
            raise ValueError(f"{where} lacks {key!r}; it has {', '.join(map(repr, record))}")
        value = record[key]
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not value.strip()):
            raise ValueError(f"{where} has {key} {value!r:.80}; expected {'text' if kind is str else kind.__name__}")


def require_inside(name: str, where: str) -> str:
    """A file's name from the data, refused with ValueError if it leads out of the folder it is looked for in."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{where} names the file {name!r}; expected a path within the data's folders")
    return name


def choose_folders(images: Folders | None, usual: Sequence[Path], what: str = "images") -> list[Path]:
    """The folders given as option `what`, else those of the usual ones that exist. FileNotFoundError if none does."""
    if images is None:
        given = list(usual)
    elif isinstance(images, (str, os.PathLike)):
        given = [Path(images)]
    else:
        given = [Path(folder) for folder in images]
    found = [folder for folder in given if folder.is_dir()]
    if not found or (images is not None and len(found) < len(given)):
        absent = ", ".join(str(folder) for folder in given if not folder.is_dir())
        raise FileNotFoundError(
            f"no folder of {what}: none of {absent} exists; name it by images="
            if images is None
            else f"{what} is {images!r}; these folders do not exist: {absent}"
        )
    return found


def find_file(name: str, folders: Sequence[Path], what: str) -> Path:
    """The first of the folders' files of that name. Raises FileNotFoundError naming `what` and all folders."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{what} {name} is in none of {', '.join(map(str, folders))}")


def read_picture(path: Path, mode: str, stored_as: Sequence[str] = ()) -> np.ndarray:
    """A picture's pixels in one of Pillow's modes. ValueError if unreadable or its own mode is not in `stored_as`."""
    try:
        with Image.open(path) as picture:
            if stored_as and picture.mode not in stored_as:
                raise ValueError(f"{path} is a picture of mode {picture.mode}; expected {' or '.join(stored_as)}")
            return np.asarray(picture.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for broken files
        raise ValueError(f"{path}: not a readable picture ({error})") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width in a picture's header. Raises ValueError if it is unreadable."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error


def one_sentence(sent_id: int, raw: str, kind: str | None = None) -> tuple[Sentence]:
    """The only sentence of a ref whose data neither clean nor split it: spaces set right, words at spaces."""
    words = raw.split()
    return (Sentence(sent_id=sent_id, raw=raw, sent=" ".join(words), tokens=tuple(words), kind=kind),)


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()
