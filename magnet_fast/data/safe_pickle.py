"""Reading pickles of plain data without running what a pickle may hold.

REFER's refs(*).p are pickles written by Python 2 and found today on mirrors only; pickle.load on such a file
runs whatever code it carries.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

_PLAIN_TYPES = frozenset({dict, list, tuple, str, bytes, int, float, bool, type(None)})


class UnsafePickleError(ValueError):
    """A pickle asks for something other than plain data."""


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle made of dict, list, tuple, str, bytes, int, float, bool and None only.

    Python 2's str come back as str, decoded as Latin-1, as the field's code does. Raises UnsafePickleError (a
    ValueError), naming the file and what it asked for, before anything of it is imported or called;
    ValueError if the file is no whole pickle.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            content = _PlainUnpickler(file, path).load()
        except UnsafePickleError:
            raise
        except Exception as error:  # pickle raises nearly any exception for bytes that are no pickle
            raise ValueError(f"{path}: not a readable pickle ({type(error).__name__}: {error})") from error
    _check_types(content, path)
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Python's unpickler with every way to name a global closed: REDUCE has nothing left to call."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        raise UnsafePickleError(
            f"{self._path}: the pickle asks for {module}.{name}; only dict, list, tuple, str, bytes, int, "
            "float, bool and None are read, because anything else could run code"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"{self._path}: the pickle asks for the outside object {pid!r}; expected plain data")


def _check_types(content: Any, path: Path) -> None:
    """Refuse what needs no global but is not in the list: sets, bytearrays."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind not in _PLAIN_TYPES:
            raise UnsafePickleError(f"{path}: the pickle holds a {kind.__name__}; expected plain data only")
        if kind in (dict, list, tuple):
            if id(item) in seen:
                continue
            seen.add(id(item))
            waiting.extend(item)
            if kind is dict:
                waiting.extend(item.values())
