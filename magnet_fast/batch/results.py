"""The folder of a batch's results: a line a row, masks, and what failed; whole at every moment."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from magnet_fast.atomic import naming, write_atomically
from magnet_fast.batch.rows import LINES, MASKS, Row
from magnet_fast.data.segmentation import bounding_box, encode_mask
from magnet_fast.inference import Segmentation

COCO, ERRORS = "results.json", "errors.csv"
_ROW = ("row", "image", "sentence")


class Failure(NamedTuple):
    """A row without a result, and why."""

    row: Row
    error: str


class Results:
    """What a batch writes into its folder, row by row; a context.

    `results.jsonl` has a line for each row that is done, with its number, image and sentence; what else depends on the
    format:

    - "png": `score`, `presence`, `area`, `box`, and in `mask` the name of a file, white on black.
    - "rle": `size` and `counts`, COCO's RLE: `pycocotools.mask.decode` takes the line as it is.
    - "jsonl": `score`, `presence`, `area`, `box`, and the RLE as `segmentation`.
    - "coco": the same with `image_id`; `finish` writes `results.json`, which pycocotools' `loadRes` reads.

    `score` is the mean probability over the mask, 0 for an empty one; `area` the mask's share of the picture; `box` is
    [x, y, width, height]. A mask's file is whole before its line is written, and a line that was half written, by a
    process that was killed, is taken off when the next one goes on.

    Args:
        folder: is made. Another process that writes to it is told apart by a lock.
        rows: all that are asked.
        format: one of `FORMATS`.
        resume: go on with the results that the folder holds.

    Attributes:
        done: numbers of the rows that are done.

    Raises:
        ValueError: the folder is none, holds results and `resume` is false, or holds those of other rows or of another
            format; another process writes to it.
    """

    def __init__(self, folder: str | os.PathLike[str], rows: Sequence[Row], format: str, resume: bool = False) -> None:
        folder = Path(folder)
        if format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out: expected a folder, got the file {folder}")
        self.folder, self.format, self._lines = folder, format, folder / LINES
        self.done: set[int] = set()
        held = [name for name in (LINES, COCO, ERRORS, MASKS) if (folder / name).exists()]
        if held and LINES not in held:
            raise ValueError(f"out: {folder} holds {held[0]}, but no {LINES} that it belongs to; name another folder")
        if held and not resume:
            raise ValueError(f"out: {folder} already holds results; --resume goes on with them")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        try:
            if held:
                self._take_up(rows)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Row, found: Segmentation) -> None:
        """Write a row's result."""
        record = dict(zip(_ROW, (row.number, row.image, row.sentence), strict=True))
        record |= FORMATS[self.format](self.folder, row, found)
        before = self._file.seek(0, os.SEEK_END)
        try:
            left = json.dumps(record).encode() + b"\n"
            with naming(self._lines):
                while left:
                    left = left[self._file.write(left) :]
        except BaseException:  # the disk is full, or Ctrl-C
            os.ftruncate(self._file.fileno(), before)
            raise
        self.done.add(row.number)

    def finish(self, failed: Iterable[Failure], complete: bool = True) -> None:
        """List what failed in errors.csv; with the format "coco", write the one file, if all rows were tried."""
        table = io.StringIO()
        lines = [(one.row.number, one.row.image, one.row.sentence, one.error) for one in failed]
        csv.writer(table).writerows([(*_ROW, "error"), *lines])
        errors = self.folder / ERRORS
        if lines:
            # Names of files may hold what is no text.
            write_atomically(errors, lambda file: file.write(table.getvalue().encode("utf-8", "backslashreplace")))
        else:
            errors.unlink(missing_ok=True)
        if complete and self.format == "coco":
            found = [json.loads(line) for line in self._lines.read_bytes().splitlines()]
            listed = [
                {"image_id": one["image_id"], "category_id": 1, "segmentation": one["segmentation"]}
                | {name: one[name] for name in ("score", *_ROW)}
                for one in sorted(found, key=lambda one: one["row"])
            ]
            write_atomically(self.folder / COCO, lambda file: file.write(json.dumps(listed).encode()))

    def _open(self) -> BinaryIO:
        while True:
            file = open(self._lines, "a+b", buffering=0)  # noqa: SIM115 (closed on leaving the context)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ValueError(f"out: {self.folder} is written to by another process; wait for its end") from None
            except OSError:  # a file system without locks
                pass
            # Another process may have put a new file in its place meanwhile.
            if self._lines.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(self._lines)):
                return file
            file.close()

    def _take_up(self, rows: Sequence[Row]) -> None:
        """Read which rows are done. Lines that cannot be used are taken off."""
        asked = {row.number: row for row in rows}
        kept, broken = [], 0
        self._file.seek(0)
        *lines, half = self._file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                row = asked.get(record["row"])
                given = record["image"], record["sentence"], record.get("image_id", row and row.image_id)
                same = row is not None and given == (row.image, row.sentence, row.image_id)
                there = "mask" not in record or (self.folder / record["mask"]).is_file()
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                broken += 1
                continue
            if not same or _MARKS[self.format] - record.keys() or record.keys() & _FOREIGN[self.format]:
                raise ValueError(
                    f"out: line {number} of {self._lines} is of another input or format; name another folder"
                )
            if record["row"] not in self.done and there:
                self.done.add(record["row"])
                kept.append(line)
        if broken:
            warnings.warn(
                f"{self._lines}: {broken} broken lines are taken off, and their rows done again", stacklevel=4
            )
        if half or len(kept) < len(lines):
            write_atomically(self._lines, lambda file: file.write(b"".join(line + b"\n" for line in kept)))
            self._file.close()
            self._file = self._open()


def _png(folder: Path, row: Row, found: Segmentation) -> dict[str, Any]:
    # Names of files have at most 255 bytes, and the temporary file's is longer.
    name = f"{MASKS}/{row.number:06d}-{row.path.stem[:40]}.png"
    (folder / MASKS).mkdir(exist_ok=True)
    mask = Image.fromarray(found.mask.astype(np.uint8) * 255)
    write_atomically(folder / name, lambda file: mask.save(file, format="PNG"))
    return {"mask": name, **_said(found)}


def _rle(folder: Path, row: Row, found: Segmentation) -> dict[str, Any]:
    return encode_mask(found.mask)


def _jsonl(folder: Path, row: Row, found: Segmentation) -> dict[str, Any]:
    return {**_said(found), "segmentation": encode_mask(found.mask)}


def _coco(folder: Path, row: Row, found: Segmentation) -> dict[str, Any]:
    return {"image_id": row.image_id, **_jsonl(folder, row, found)}


FORMATS: dict[str, Callable[[Path, Row, Segmentation], dict[str, Any]]] = {
    "png": _png,
    "rle": _rle,
    "jsonl": _jsonl,
    "coco": _coco,
}
"""By name, what a line has beside the row."""

# By what a format's lines are known.
_MARKS = {"png": {"mask"}, "rle": {"counts"}, "jsonl": {"segmentation"}, "coco": {"segmentation", "image_id"}}
_FOREIGN = {"png": set(), "rle": set(), "jsonl": {"image_id"}, "coco": set()}


def _said(found: Segmentation) -> dict[str, Any]:
    inside = found.probability[found.mask]
    return {
        "score": round(float(inside.mean(dtype=np.float64)), 6) if inside.size else 0.0,
        "presence": None if found.presence is None else round(found.presence, 6),
        "area": round(float(found.mask.mean()), 6),
        "box": bounding_box(found.mask) or [0, 0, 0, 0],
    }
