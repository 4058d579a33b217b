"""Tables: CSV, TSV and JSON lines, a row for each sentence."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magnet_fast.data.importing.drawings import box, mask_file, outline
from magnet_fast.data.importing.record import Drawing, Problems, Record, as_texts
from magnet_fast.data.values import shown

DRAWN = ("mask", "polygon", "box", "rle")
_A_BOX = "expected [x, y, width, height]"
_LONGEST = 1 << 24  # characters of a field, of which a long outline has many; Python's own limit is 2 ** 17


def read_table(path: Path, problems: Problems) -> Iterator[Record]:
    """The rows of a table with the columns image, sentence and, in each row, one of mask, polygon, box and rle.

    Rows are counted as spreadsheets and editors count them, the header being row 1. Other columns are left alone.

    Args:
        path: of a .csv (commas, semicolons or tabs), a .tsv or a .jsonl file, in UTF-8.
        problems: of single rows; gathered while records are taken.

    Raises ValueError for what is no such table.
    """
    rows = _json_lines(path, problems) if path.suffix.lower() == ".jsonl" else _delimited(path, problems)
    for number, row in rows:
        where = f"row {number}"
        with problems.at(where):
            yield _record(where, row, path.parent)


def _record(where: str, row: dict[str, Any], folder: Path) -> Record:
    name = row.get("image")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"image is {shown(name)}; expected the path of a picture")
    given = [key for key in DRAWN if row.get(key) is not None and row[key] != ""]
    if len(given) != 1:
        raise ValueError(f"row has {' and '.join(given) or 'nothing drawn'}; expected one of {', '.join(DRAWN)}")
    return Record(where, (name.strip(),), _drawing(given[0], row[given[0]], folder), as_texts(row.get("sentence", "")))


def _drawing(kind: str, value: Any, folder: Path) -> Drawing:
    if kind == "mask":
        if not isinstance(value, str):
            raise ValueError(f"mask is {shown(value)}; expected the path of a picture")
        return mask_file(folder / value.strip())
    if kind == "box":
        value = _from_text(kind, value, _A_BOX)
        if not isinstance(value, list) or len(value) != 4:
            raise ValueError(f"box is {shown(value)}; {_A_BOX}")
        return box(value)
    if kind == "polygon":
        return outline(_from_text(kind, value, "expected [[x1, y1, x2, y2, ...], ...]"))
    return outline(_from_text(kind, value, 'expected {"size": [height, width], "counts": ...}'))


def _from_text(kind: str, value: Any, expected: str) -> Any:
    """A value of JSON lines as it is, of a table's cell read as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind} is {shown(value)}, no JSON; {expected}") from error


def _json_lines(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"row {number}: expected a line of JSON, got {shown(line)} ({error})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"row {number}: expected a dict, got {shown(row)}")


def _delimited(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, str]]]:
    text = _text(path)
    delimiter, header = _header(path, text)
    for number, fields in _fields(text, delimiter, problems):
        if number == 1 or not any(map(str.strip, fields)):
            continue
        if len(fields) != len(header):
            problems.append(
                f"row {number}: row has {len(fields)} cells, the header {len(header)}; expected as many: "
                f"put a cell that holds {delimiter!r} into double quotes"
            )
            continue
        yield number, {key: value.strip() for key, value in zip(header, fields, strict=True)}


def _fields(text: str, delimiter: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    before = csv.field_size_limit(_LONGEST)
    try:
        number = 0
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            for number, fields in enumerate(rows, start=1):
                yield number, fields
        except csv.Error as error:
            problems.append(f"row {number + 1}: not readable, nor what follows: expected plain CSV, got {error}")
    finally:
        csv.field_size_limit(before)


def _header(path: Path, text: str) -> tuple[str, list[str]]:
    """What stands between the cells, and the names of the columns."""
    first = io.StringIO(text, newline="").readline().rstrip("\r\n")  # lines may end in either, or in both
    for delimiter in ",;\t":
        try:
            header = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        except csv.Error:  # longer than Python's limit: no header
            break
        if {"image", "sentence"} <= set(header) and set(DRAWN) & set(header):
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: expected each column once, got {shown(first)}")
            return delimiter, header
    raise ValueError(
        f"{path}: expected the columns image, sentence and one of {', '.join(DRAWN)} in its first line, "
        f"got {shown(first)}"
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # line ends as they are, for csv
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got other bytes ({error})") from error
