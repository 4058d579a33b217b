"""Tables: CSV, TSV and JSON lines, a row for each sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magnet_fast.data.importing.drawings import box, mask_file, outline
from magnet_fast.data.importing.record import Drawing, Problems, Record, as_texts
from magnet_fast.data.tables import read_table
from magnet_fast.data.values import shown

DRAWN = ("mask", "polygon", "box", "rle")
_A_BOX = "expected [x, y, width, height]"


def read_drawings(path: Path, problems: Problems) -> Iterator[Record]:
    """The rows of a table with the columns image, sentence and, in each row, one of mask, polygon, box and rle.

    Args:
        path: of a .csv, a .tsv or a .jsonl file, see `read_table`.
        problems: of single rows; gathered while records are taken.

    Raises ValueError for what is no such table.
    """
    for line in read_table(path, (("image",), ("sentence",), DRAWN)):
        where = f"row {line.number}"
        with problems.at(where):
            if line.problem:
                raise ValueError(line.problem)
            yield _record(where, line.record, path.parent)


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
