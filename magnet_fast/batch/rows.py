"""What is asked of which picture: rows of a table, or the pictures of a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from magnet_fast.data.values import shown

_COLUMNS = ("image", "sentence")
_ID = "image_id"


class Row(NamedTuple):
    """One sentence about one picture.

    Attributes:
        number: of the row, from 1.
        image: the picture as the input names it; of a folder, below it.
        sentence: what is to be segmented.
        path: the picture's file.
        image_id: COCO's; the input's own, or the picture's number in the order in which pictures come.
        problem: why the row cannot be used; empty for a good one.
    """

    number: int
    image: str
    sentence: str
    path: Path
    image_id: int | str = 0
    problem: str = ""


def read_rows(source: Path, expression: str | None = None, leave_out: Path | None = None) -> list[Row]:
    """The rows of a table (.csv with a header, or .jsonl, UTF-8) or of a folder.

    A table has the columns `image`, a path that starts at the table's folder, and `sentence`; it may have `image_id`, a
    number or a text. Other columns are not read. In a folder and those below it, all files are taken whose names end as
    pictures' do, in the order of their names; hidden ones are not.

    Args:
        source: the table or the folder.
        expression: the sentence about all pictures of a folder.
        leave_out: a folder whose pictures are not taken: that of the masks.

    Returns:
        All rows, those that cannot be used with their `problem`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table, or there is nothing in it; a folder without an expression, or a table with one.
    """
    if source.is_dir():
        if expression is None or not expression.strip():
            raise ValueError(
                f"expression: expected a sentence for all pictures of the folder {source}, got {expression!r}"
            )
        rows = _of_folder(source, expression, leave_out)
    else:
        if source.suffix.lower() not in _READERS:
            raise ValueError(f"input: expected a folder or a table, .csv or .jsonl, got {source}")
        if not source.is_file():
            raise FileNotFoundError(f"input {source} does not exist")
        if expression is not None:
            raise ValueError(f"expression: expected a folder with it; the table {source} has a sentence in each row")
        rows = _of_table(source)
    if not rows:
        raise ValueError(f"input {source}: there is no row or picture in it")
    return rows


def _of_folder(folder: Path, expression: str, leave_out: Path | None) -> list[Row]:
    Image.init()
    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    root, skipped = folder.resolve(), leave_out and leave_out.resolve()
    names = [
        path.relative_to(root)
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in endings and skipped not in path.parents and path.is_file()
    ]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [Row(n, str(name), expression, folder / name, n) for n, name in enumerate(names, start=1)]


def _of_table(path: Path) -> list[Row]:
    try:
        records = list(_READERS[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"input {path}: not text in UTF-8 ({error.reason} at byte {error.start}); save it so"
        ) from error
    with_ids = any(_ID in record for record, _ in records)
    numbers: dict[str, int] = {}
    rows = []
    for number, (record, problem) in enumerate(records, start=1):
        problem = problem or _problem(record, with_ids)
        image, sentence = (record[name] if isinstance(record.get(name), str) else "" for name in _COLUMNS)
        counted = numbers.setdefault(image, len(numbers) + 1)
        image_id = record[_ID] if with_ids and not problem else counted
        rows.append(Row(number, image, sentence, path.parent / image, image_id, problem))
    return rows


def _problem(record: dict[str, Any], with_ids: bool) -> str:
    for name in _COLUMNS:
        value = record.get(name)
        if not isinstance(value, str):
            return f"{name}: expected text, got {shown(value)}"
        if not value.strip():
            return f"{name}: expected text, got an empty one"
    if with_ids and (type(record.get(_ID)) not in (int, str) or record[_ID] == ""):
        return f"{_ID}: expected a number or a text, as in other rows, got {shown(record.get(_ID))}"
    return ""


def _csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row as a record, and why it cannot be used."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)  # an open quote would swallow the rest
        try:
            header = [name.strip() for name in next(reader, [])]
            if any(header.count(name) != 1 for name in _COLUMNS) or header.count(_ID) > 1:
                raise ValueError(
                    f"input {path}: expected a first line with the columns image and sentence, a comma between, "
                    f"got {shown(','.join(header))}"
                )
            for values in reader:
                if not values:  # a blank line
                    continue
                record: dict[str, Any] = dict(zip(header, values, strict=False))
                problem = ""
                if len(values) != len(header):
                    problem = (
                        f"expected {len(header)} values, got {len(values)}; a sentence with a comma stands in quotes"
                    )
                given = record.get(_ID, "")
                if given.isascii() and given.isdigit() and len(given) <= 18:
                    record[_ID] = int(given)
                yield record, problem
        except csv.Error as error:
            raise ValueError(f"input {path}: line {reader.line_num} is no CSV: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each line as a record, and why it cannot be used."""
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield {}, f"no JSON in this line: {error}"
                continue
            yield (record, "") if isinstance(record, dict) else ({}, f"expected an object, got {shown(record)}")


_READERS = {".csv": _csv, ".jsonl": _jsonl}
