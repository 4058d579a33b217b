"""What is asked of which picture: rows of a table, or the pictures of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from magnet_fast.data.tables import read_table
from magnet_fast.data.values import shown

_COLUMNS = ("image", "sentence")
_ID = "image_id"
LINES, MASKS = "results.jsonl", "masks"  # of a batch's results
_TABLES = (".csv", ".tsv", ".jsonl")


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


def read_rows(source: str | os.PathLike[str], expression: str | None = None) -> list[Row]:
    """The rows of a table (.csv, .tsv or .jsonl, see `read_table`) or of a folder.

    A table has the columns `image`, a path that starts at the table's folder, and `sentence`; it may have `image_id`, a
    number or a text. Other columns are not read. In a folder and those below it, all files are taken whose names end as
    pictures' do, in the order of their names; hidden ones are not, nor masks that a batch wrote there.

    Args:
        source: the table or the folder.
        expression: the sentence about all pictures of a folder.

    Returns:
        All rows, those that cannot be used with their `problem`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table, or there is nothing in it; a folder without an expression, or a table with one.
    """
    source = Path(source)
    if source.is_dir():
        if expression is None or not expression.strip():
            raise ValueError(
                f"expression: expected a sentence for all pictures of the folder {source}, got {expression!r}"
            )
        rows = _of_folder(source, expression)
    else:
        if not source.is_file():
            raise FileNotFoundError(f"input {source} does not exist")
        if source.suffix.lower() not in _TABLES:
            raise ValueError(f"input: expected a folder or a table, {', '.join(_TABLES)}, got {source}")
        if expression is not None:
            raise ValueError(f"expression: expected a folder with it; the table {source} has a sentence in each row")
        rows = _of_table(source)
    if not rows:
        raise ValueError(f"input {source}: there is no row or picture in it")
    return rows


def _of_folder(folder: Path, expression: str) -> list[Row]:
    Image.init()
    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    root = folder.resolve()
    written = {lines.parent / MASKS for lines in root.rglob(LINES)}
    names = [
        path.relative_to(root)
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in endings and written.isdisjoint(path.parents) and path.is_file()
    ]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [Row(n, str(name), expression, folder / name, n) for n, name in enumerate(names, start=1)]


def _of_table(path: Path) -> list[Row]:
    lines = read_table(path, [[name] for name in _COLUMNS], may=[_ID])
    if path.suffix.lower() != ".jsonl":  # all of a cell is text
        for line in lines:
            given = line.record.get(_ID, "")
            if given.isascii() and given.isdigit() and len(given) <= 18:
                line.record[_ID] = int(given)
    with_ids = any(_ID in line.record for line in lines)
    numbers: dict[str, int] = {}
    named: dict[int | str, str] = {}  # the picture of each id
    rows = []
    for number, line in enumerate(lines, start=1):
        record = line.record
        problem = line.problem or _problem(record, with_ids)
        image, sentence = (record[name] if isinstance(record.get(name), str) else "" for name in _COLUMNS)
        if with_ids and not problem and (other := named.setdefault(record[_ID], image)) != image:
            problem = f"{_ID}: expected another than {shown(record[_ID])}, which is that of {other}"
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
