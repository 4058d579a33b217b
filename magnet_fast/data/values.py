"""Values in data sets' files: read where their meaning is plain, else refused in words that name the record."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from magnet_fast.showing import short

MAX_SIDE = 1_000_000
MAX_PIXELS = 178_956_970
"""Of an image: Pillow opens none that is larger, and masks are allocated by what a file says."""

_LONGEST = 300  # characters of a value in a message
_WHOLE = re.compile(r"\s*([+-]?\d{1,18})(?:\.0*)?\s*", re.ASCII)
_JSON = {None: "null", True: "true", False: "false"}


def shown(value: Any) -> str:
    """A value as a message shows it: one line of bounded length, whatever it is."""
    if value is None or isinstance(value, bool):
        return _JSON[value]
    text = short(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."  # of lists in lists, each is short


def whole(value: Any) -> int | None:
    """A whole number, from 64 as from 64.0, "64" and "64.0"; None for anything else, True and NaN too."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = _WHOLE.fullmatch(value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def require_id(value: Any, what: str, where: str) -> int:
    """An id, which travels in tensors of int64 and is looked up in other files: a whole number, never text."""
    number = None if isinstance(value, str) else whole(value)
    if number is None or not -(1 << 63) <= number < 1 << 63:
        quoted = ", without quotes, in every file" if isinstance(value, str) else ""
        raise ValueError(f"{where} has {what} {shown(value)}; expected a whole number{quoted}")
    return number


def require_size(record: dict[str, Any], where: str) -> tuple[int, int]:
    """Height and width of an image, from 1 to what Pillow opens."""
    size = []
    for key in ("height", "width"):
        if key not in record:
            raise ValueError(f"{where} lacks {key!r}; it has {key_names(record)}")
        number = whole(record[key])
        if number is None:
            raise ValueError(f"{where} has {key} {shown(record[key])}; expected a whole number of pixels")
        if not 1 <= number <= MAX_SIDE:
            raise ValueError(f"{where} has {key} {shown(record[key])}; expected 1 to {MAX_SIDE} pixels")
        size.append(number)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{where} has {size[0]} x {size[1]} pixels; expected at most {MAX_PIXELS}, which Pillow opens")
    return size[0], size[1]


def require(record: Any, kinds: dict[str, type], where: str) -> None:
    """Raise ValueError unless a record is a dict of these keys with values of these kinds; text must not be blank."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {shown(record)}; expected a dict")
    for key, kind in kinds.items():
        if key not in record:
            raise ValueError(f"{where} lacks {key!r}; it has {key_names(record)}")
        value = record[key]
        if kind is object:  # anything: its own check follows
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not value.strip()):
            raise ValueError(f"{where} has {key} {shown(value)}; expected {'text' if kind is str else kind.__name__}")


def require_inside(name: Any, where: str) -> str:
    """A file's name from the data, refused with ValueError if it leads out of the folder it is looked for in."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} names the file {shown(name)}; expected text")
    if name.isprintable() and ".." not in name and name[0] != "/":  # nearly every one, told fast
        return name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{where} names the file {shown(name)}; expected a path within the data's folders")
    if any(ord(one) < 32 or 0xD800 <= ord(one) < 0xE000 or ord(one) == 127 for one in name):
        raise ValueError(f"{where} names the file {shown(name)}; expected a name without control characters")
    return name


def key_names(record: dict[Any, Any]) -> str:
    """The first keys of a record, for a message."""
    return ", ".join(map(shown, list(record)[:12])) + (", ..." if len(record) > 12 else "") if record else "no key"
