"""Reading pickles of plain data without running what a pickle may hold.

REFER's refs(*).p are pickles written by Python 2 and found today on mirrors only; pickle.load on such a file
runs whatever code it carries.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from magnet_fast.inert import InertUnpickler, PickledArray, StandIn, check_program, paths, type_name
from magnet_fast.models.files import foreign
from magnet_fast.showing import shown

_PLAIN_TYPES = frozenset({dict, list, tuple, str, bytes, int, float, bool, type(None)})
_MOST_WRITTEN_OUT = 1_000_000
_EXPECTED = "expected dict, list, tuple, str, bytes, int, float, bool, None and NumPy's numbers only"


class UnsafePickleError(ValueError):
    """A pickle asks for something other than plain data."""


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle made of dict, list, tuple, str, bytes, int, float, bool and None only.

    Python 2's str come back as str, decoded as Latin-1, as the field's code does; NumPy's scalars as plain numbers,
    its arrays as lists. Raises UnsafePickleError (a ValueError), naming the file, what it asked for and where, without
    importing or calling any of it; ValueError if the file is no whole pickle.
    """
    path = Path(path)
    stored = path.read_bytes()
    file = io.BytesIO(stored)
    unpickler = InertUnpickler(file, len(stored))
    try:
        check_program(stored)
        content = unpickler.load()
        rest = file.read(1)
    except Exception as error:  # pickle raises nearly any exception for bytes that are no pickle
        if unpickler.unknown:
            raise UnsafePickleError(f"{path}: the pickle asks for {unpickler.unknown[0]}; {_EXPECTED}") from error
        meaning = foreign(stored[:1024])
        reason = f"not a readable pickle ({type(error).__name__}: {error})" if meaning is None else meaning
        raise ValueError(f"{path}: {reason}") from error
    if rest:
        raise ValueError(f"{path}: something follows the pickle, more refs it may be; expected one list in one pickle")
    if unpickler.outside:
        pid = unpickler.outside[0]
        raise UnsafePickleError(f"{path}: the pickle asks for the outside object {shown(pid)}; {_EXPECTED}")
    if unpickler.named:
        _unpack_arrays(content, path)
    _check_types(content, path)
    if unpickler.unknown:  # asked for and thrown away
        raise UnsafePickleError(f"{path}: the pickle asks for {unpickler.unknown[0]}; {_EXPECTED}")
    return content


def _unpack_arrays(content: Any, path: Path) -> None:
    """Put plain lists where dictionaries and lists hold arrays."""
    found: dict[int, list] = {}  # one that is held a thousand times is one list
    seen = set()
    for place, item in paths(content):
        if isinstance(item, dict | list) and id(item) not in seen:
            seen.add(id(item))
            for key, value in item.items() if isinstance(item, dict) else enumerate(item):
                if isinstance(value, PickledArray):
                    try:
                        if id(value) not in found:
                            found[id(value)] = value.array().tolist()
                        item[key] = found[id(value)]
                    except ValueError as error:
                        where = _where(f"{place}/{key}" if place else f"{key}")
                        raise UnsafePickleError(
                            f"{path}: the pickle holds a numpy.ndarray{where}, {error}; {_EXPECTED}"
                        ) from error


def _check_types(content: Any, path: Path) -> None:
    """Refuse stand-ins, and what needs no name but is not in the list: sets, bytearrays; and lists that name one
    another so often that whoever reads them, each time anew, would not come to an end."""
    waiting, seen, shared = [content], set(), False
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind not in _PLAIN_TYPES:
            raise UnsafePickleError(_refusal(content, path))
        if kind in (dict, list, tuple):
            if id(item) in seen:
                shared = True
                continue
            seen.add(id(item))
            waiting.extend(item)
            if kind is dict:
                waiting.extend(item.values())
    if shared and _written_out(content) > (most := _MOST_WRITTEN_OUT + 100 * len(seen)):
        raise ValueError(f"{path}: its lists name one another so often that written out they hold over {most} values")


def _written_out(content: Any) -> int:
    """Entries of all containers, those of one that is named again counted again; of one within itself once."""
    waiting, begun, sizes = [content], set(), {}
    while waiting:
        item = waiting[-1]
        if id(item) in sizes:  # named by several, it waited several times
            waiting.pop()
            continue
        inner = [one for one in _inner(item) if type(one) in (dict, list, tuple)]
        if id(item) in begun:
            sizes[id(item)] = len(item) + sum(sizes.get(id(one), 0) for one in inner)
        else:
            begun.add(id(item))
            waiting.extend(one for one in inner if id(one) not in begun)
    return sizes[id(content)]


def _inner(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _refusal(content: Any, path: Path) -> str:
    place, item = next((place, item) for place, item in paths(content) if type(item) not in _PLAIN_TYPES)
    asked = "asks for" if isinstance(item, StandIn | type) else "holds a"
    why = "because anything else could run code"
    return f"{path}: the pickle {asked} {type_name(item)}{_where(place)}; {_EXPECTED}, {why}"


def _where(place: str) -> str:
    record, _, key = place.partition("/")
    return f" in record {record}" + (f", key {key!r}" if key else "") if place else ""
