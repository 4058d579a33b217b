"""Tables that people write, CSV, TSV and JSON lines: a record a row, and what is wrong with a row beside it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from magnet_fast.data.values import shown

_BETWEEN = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LONGEST = 1 << 24  # characters of a cell, of which a long outline has many; Python's own limit is 2 ** 17
_LINE_END = re.compile(rb"\r\n|\r|\n")


class Line(NamedTuple):
    """A row of a table.

    Attributes:
        number: as spreadsheets and editors count, a header being row 1.
        record: by column, in lower case where a column is one of those asked for; cells of CSV are text without spaces
            around. Of a row with a problem, what can be told.
        problem: why it cannot be used; empty for a good one.
    """

    number: int
    record: dict[str, Any]
    problem: str = ""


def read_table(path: Path, needs: Sequence[Sequence[str]], may: Sequence[str] = ()) -> list[Line]:
    """The rows of a table in UTF-8, with or without a byte order mark; blank ones are left out.

    A .jsonl file has a JSON object a line. Any other has a header, and commas, semicolons or tabs between its cells:
    those under which the header has the columns that are needed. Cells with a line's end or with what stands between
    cells are quoted. Names of columns may be in capitals; other columns are not looked at.

    Args:
        path: of the file.
        needs: columns, in lower case: of each group one must be there. Of JSON lines each record is asked for itself,
            by the caller.
        may: other columns that the caller reads.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, its header lacks a column or has one twice, or its quotes do not match.
    """
    text = _text(path)
    known = {*may, *(name for group in needs for name in group)}
    if path.suffix.lower() == ".jsonl":
        return list(_json_lines(text, known))
    with _long_cells():
        return list(_rows(path, text, needs, known))


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # line ends as they are, for csv
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(content[: error.start])) + 1
        raise ValueError(
            f"{path}: line {line}: expected text in UTF-8, got other bytes ({error.reason}); save it as UTF-8"
        ) from error


def _json_lines(text: str, known: set[str]) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):  # other line ends may stand in JSON's strings
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, f"expected a line of JSON, got {shown(line)} ({error})")
            continue
        if not isinstance(found, dict):
            yield Line(number, {}, f"expected a JSON object, got {shown(found)}")
            continue
        names = [_named(name, known) for name in found]
        twice = [name for name in known if names.count(name) > 1]
        problem = f"expected {twice[0]} once, got {shown(list(found))}" if twice else ""
        yield Line(number, {} if problem else dict(zip(names, found.values(), strict=True)), problem)


def _rows(path: Path, text: str, needs: Sequence[Sequence[str]], known: set[str]) -> Iterator[Line]:
    between, header = _header(path, text, needs, known)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)  # else an open quote takes all
    number = 0
    try:
        for number, cells in enumerate(reader, start=1):
            if number == 1 or not any(map(str.strip, cells)):
                continue
            if len(cells) != len(header):
                problem = (
                    f"row has {len(cells)} cells, the header {len(header)}; expected as many: "
                    f"put a cell that holds {between!r} into double quotes"
                )
            else:
                problem = ""
            yield Line(number, dict(zip(header, map(str.strip, cells), strict=False)), problem)
    except csv.Error as error:
        raise ValueError(
            f"{path}: row {number + 1}: expected plain CSV, got {error}; see that all quotes are closed"
        ) from error


def _header(path: Path, text: str, needs: Sequence[Sequence[str]], known: set[str]) -> tuple[str, list[str]]:
    """What stands between the cells, and the names of the columns: by what is asked for, never by counting."""
    headers = {between: _names(text, between, known) for between in _BETWEEN}
    lacking = {between: [group for group in needs if not {*group} & {*names}] for between, names in headers.items()}
    fitting = [between for between in _BETWEEN if not lacking[between]]
    first = shown(io.StringIO(text, newline="").readline().rstrip("\r\n"))  # lines may end in either, or in both
    if len(fitting) > 1:
        several = " or ".join(_BETWEEN[between] for between in fitting)
        raise ValueError(f"{path}: expected a first line that reads in one way, got {first}, with {several}")
    if not fitting:
        nearest = min(_BETWEEN, key=lambda between: len(lacking[between]))
        raise ValueError(
            f"{path}: expected a first line with the columns {_listed(needs)}, and commas, semicolons or tabs between, "
            f"got {first}, without {_listed(lacking[nearest])}"
        )
    names = headers[fitting[0]]
    if twice := [name for name in names if name in known and names.count(name) > 1]:
        raise ValueError(f"{path}: expected each column once, got {twice[0]!r} twice in {first}")
    return fitting[0], names


def _names(text: str, between: str, known: set[str]) -> list[str]:
    try:
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True), [])
    except csv.Error:
        return []
    return [_named(name, known) for name in cells]


def _named(name: str, known: set[str]) -> str:
    lower = name.strip().lower()
    return lower if lower in known else name


def _listed(groups: Sequence[Sequence[str]]) -> str:
    return ", ".join(group[0] if len(group) == 1 else f"one of ({', '.join(group)})" for group in groups)


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)
