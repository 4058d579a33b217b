"""What readers have in common: refs by split, records left out, big JSON read record by record, folders, pictures."""

from __future__ import annotations

import gc
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from magnet_fast.data.datasets.reader import Ref, Sentence, Tally
from magnet_fast.data.transforms.pictures import ProgramError, opened_plainly, too_large
from magnet_fast.models.files import foreign

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Option `images`: one folder or several, looked through in order."""

HOW_TO_NAME = "by images= (--images; data.images in a configuration)"
PUT_THERE = "; put it there, or name its folder by images= (--images; data.images in a configuration)"
"""How the error of a picture that is in none of the folders ends."""

_NAMED = 3  # of the records of one reason, where a reader is opened; `data check` names more
_SPACE = re.compile(r"[ \t\r\n]*")


class RecordError(ValueError):
    """A record that cannot be used, and what kind of fault it has."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class BrokenRecordsError(ValueError):
    """Some records cannot be used. `reader` reads the others: `data check` looks at them, too."""

    reader: BaseReader


class BaseReader:
    """Refs in lists by split. A reader adds sizes, paths and masks, and calls `_close` when it has read everything.

    Faults are collected, so that none hides the next: what is read under `_file` or `_record` does not stop the rest.

    Attributes:
        source: the file that the refs come from, for messages; a folder where there are several.
        skipped: records left out, as the field's own readers do.
        doubtful: what is left out or unclear, and hardly meant so.
        broken: records that cannot be used; where there are any, opening ends in `BrokenRecordsError`.
    """

    def __init__(self, source: Path, customary: Sequence[str]) -> None:
        self.source, self.skipped, self.doubtful, self.broken = source, Tally(), Tally(), Tally()
        self._customary = customary
        self._refs: dict[str, list[Ref]] = {}
        self._unread: list[OSError | ValueError] = []

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

    @contextmanager
    def _file(self) -> Iterator[None]:
        """Keep the error of a file or folder for `_close`."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._unread.append(error)

    @contextmanager
    def _record(self) -> Iterator[None]:
        """Count a record that raises ValueError among the broken ones."""
        try:
            yield
        except ValueError as error:
            self.broken.add(error.kind if isinstance(error, RecordError) else "unexpected form", str(error))

    def _close(self) -> None:
        """Raise what cannot be used, or that nothing is left; say what was left out or is doubtful."""
        broken, doubtful = self.broken.told(_NAMED), self.doubtful.told(_NAMED)
        if self._unread:
            if len(self._unread) == 1 and not broken and not doubtful:
                raise self._unread[0]
            absent = all(isinstance(error, FileNotFoundError) for error in self._unread)
            kind = FileNotFoundError if absent else ValueError
            raise kind("; ".join([*map(str, self._unread), *broken, *doubtful])) from self._unread[0]
        if broken:
            several = sum(self.broken.reasons.values()) > _NAMED
            more = "; `data check` names more of them" * several
            error = BrokenRecordsError(f"{self.source}: cannot use {'; '.join(broken + doubtful)}{more}")
            error.reader = self
            raise error
        if not self._refs:
            left_out = "; ".join(self.skipped.told(_NAMED) + doubtful)
            raise ValueError(f"{self.source}: no record can be used{f'; left out {left_out}' if left_out else ''}")
        if self.skipped.reasons:
            warnings.warn(f"{self.source}: left out {'; '.join(self.skipped.told(_NAMED))}", stacklevel=3)
        if doubtful:
            warnings.warn(f"{self.source}: in doubt: {'; '.join(doubtful)}", stacklevel=3)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which takes a third of the time where millions of lists come into being."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path, *, unique: bool = False) -> Any:
    """A JSON file, in any encoding of Unicode.

    Raises FileNotFoundError, or ValueError for what is no JSON, with the path; with `unique`, also for a key that
    stands twice in one dict, of which Python would keep the later.
    """
    text = _read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as error:
        lines = "; more than one value, one after the other: expected one list" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}: not valid JSON ({error}{lines})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def each_record(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one after the other.

    A data set's polygons take gigabytes as Python's numbers; one at a time, only what is kept of them stays. Raises
    FileNotFoundError, or ValueError with path and place for what is no JSON or no list.
    """
    text = _read_text(path)
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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON (record {number}: {error})") from error
        yield record
        number += 1
        place = _after_space(text, place)
    if _after_space(text, place + 1) != len(text):
        raise ValueError(f"{path}: not valid JSON (something follows the list, at character {place + 1})")


def begins_with(path: Path, sign: str) -> bool:
    """Whether the first character of a JSON file is this one, in any encoding that `read_json` reads."""
    with path.open("rb") as file:
        start = file.read(1024)
    return start.decode(json.detect_encoding(start), errors="ignore").lstrip().startswith(sign)


def choose_folders(root: Path, images: Folders | None, usual: Sequence[Path], what: str = "images") -> list[Path]:
    """The folders given as option `what`, absolute or below the root, else those of the usual ones that exist.

    Raises:
        FileNotFoundError: none exists, or one that was given does not.
    """
    if images is None:
        given = list(usual)
    else:
        several = [images] if isinstance(images, (str, os.PathLike)) else images
        given = [root / folder for folder in several]  # an absolute one stays as it is
    found = [folder for folder in given if folder.is_dir()]
    if not found or (images is not None and len(found) < len(given)):
        absent = ", ".join(str(folder) for folder in given if not folder.is_dir())
        raise FileNotFoundError(
            f"no folder of {what}: none of {absent} exists; name it {HOW_TO_NAME}"
            if images is None
            else f"{what} is {images!r}; these folders do not exist: {absent}; name them {HOW_TO_NAME}"
        )
    return found


def find_file(name: str, folders: Sequence[Path], what: str) -> Path:
    """The first of the folders' files of that name. Raises FileNotFoundError naming `what` and all folders."""
    for folder in folders:
        if os.path.isfile(folder / name):  # a name may be longer than a system's, which a Path is an error for
            return folder / name
    raise FileNotFoundError(f"{what} {name} is in none of {', '.join(map(str, folders))}{PUT_THERE}")


def read_picture(path: Path, mode: str, stored_as: Sequence[str] = ()) -> np.ndarray:
    """A picture's pixels in one of Pillow's modes. ValueError if unreadable or its own mode is not in `stored_as`."""
    with _opened(path) as picture:
        if stored_as and picture.mode not in stored_as:
            raise ValueError(f"{path} is a picture of mode {picture.mode}; expected {' or '.join(stored_as)}")
        try:
            return np.asarray(picture.convert(mode))
        except Exception as error:  # of a broken file, many kinds
            raise ValueError(f"{path}: not a readable picture ({error})") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width in a picture's header. Raises ValueError if it is unreadable."""
    with _opened(path) as picture:
        return picture.height, picture.width


def _opened(path: Path) -> Image.Image:
    try:
        return opened_plainly(path)
    except ProgramError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(too_large(error, str(path))) from error
    except Exception as error:  # of a broken file, many kinds
        raise ValueError(f"{path}: not a readable picture ({error})") from error


def one_sentence(sent_id: int, raw: str, kind: str | None = None) -> tuple[Sentence]:
    """The only sentence of a ref whose data neither clean nor split it: spaces set right, words at spaces."""
    words = raw.split()
    return (Sentence(sent_id=sent_id, raw=raw, sent=" ".join(words), tokens=tuple(words), kind=kind),)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: not valid JSON (it is empty)")
    if (meaning := foreign(content[:1024])) is not None:
        raise ValueError(f"{path}: {meaning}")
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}; expected UTF-8)") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"a dict holds the key {next(key for key in keys if keys.count(key) > 1)!r:.100} twice")
    return found


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()
