"""Values of files in messages."""

from __future__ import annotations

from typing import Any


def shown(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut to `most` characters; its type where it is nested too deeply for that: what a
    file holds may be read on a shallow stack and be told of on a deep one."""
    try:
        return repr(value)[:most]
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
