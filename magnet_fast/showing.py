"""Values of files in messages."""

from __future__ import annotations

import reprlib
from typing import Any


class _Bounded(reprlib.Repr):
    """Few entries of few levels. A file of a hundred bytes may hold lists of which each names the one before twice:
    written whole, their text fits in no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 4, 4, 60, 60

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, dict):  # of a class of its own, which Python would write whole
            return self.repr_dict(x, level)
        return super().repr_instance(x, level)


_BOUNDED = _Bounded()


def short(value: Any) -> str:
    """A value as Python writes it, of at most some thousands of characters, whatever it is."""
    try:
        return _BOUNDED.repr(value)
    except ValueError:  # Python prints no int of thousands of digits
        return f"a {type(value).__name__} too long to print"


def shown(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut to `most` characters."""
    return short(value)[:most]
