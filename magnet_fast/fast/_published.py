"""Fingerprints of published classes: what `_source.fingerprints` finds in them. A hash of a text, not the text.

Each was computed from one stored version of a file, whose repository, path and commit stand beside it; `and` names
others that were read and have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """One form of a class, as it was published.

    Attributes:
        kind: what `copies` makes of it.
        title: whose it is.
        name: of the class.
        units: fingerprints of what a call runs; several where a function was written in several ways that mean the
            same.
        places: where it stands, "repository: path @ commit".
        unread: names outside the class that may be anything: the fused way makes sure that a call does not reach them,
            or reaches the same whatever they are.
    """

    kind: str
    title: str
    name: str
    units: Mapping[str, str | tuple[str, ...]]
    places: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def differences(self, found: Mapping[str, str]) -> list[str]:
        """Names of what is not as published: changed, missing or more."""
        read = {name: value for name, value in found.items() if name.partition(".")[0] not in self.unread}
        wrong = [name for name, value in self.units.items() if read.get(name) not in _either(value)]
        return wrong + sorted(read.keys() - self.units.keys())


def _either(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,)


PUBLISHED: tuple[Published, ...] = ()
