"""What every format is read into: one plain record for each object that a row, an annotation or a region describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from magnet_fast.data.values import shown

Drawing = Callable[[int, int], list | dict | np.ndarray]
"""What is drawn, given the picture's height and width in pixels, once these are known: COCO's polygons, its RLE, or a
mask (H, W) of bool. Raises ValueError or OSError where it cannot be used."""

SENTENCE_KEYS = (
    "sentence", "sentences", "caption", "captions", "phrase", "phrases", "expression", "expressions", "text",
)  # fmt: skip
"""Names under which annotations hold sentences, in lower case."""


@dataclass(frozen=True)
class Record:
    """An object in a picture, and sentences that name it; nothing of it is looked at yet.

    Attributes:
        where: what messages call it, such as "row 7".
        names: names under which its picture may be found, the likeliest first.
        draw: draws it.
        sentences: as the source has them; none where it has only a label.
        label: its category.
        size: height and width that the source says of the picture.
    """

    where: str
    names: tuple[str, ...]
    draw: Drawing
    sentences: tuple[Any, ...] = ()
    label: str | None = None
    size: tuple[int, int] | None = None


class Problems(list[str]):
    """What is wrong, each with where it stands; collected, so that none hides the next."""

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Keep an error as a problem of that place."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.append(f"{where}: {error}")


def as_texts(value: Any) -> tuple[Any, ...]:
    """One sentence or a list of them; none for null. What is no text is told when sentences are looked at."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def require_list(value: Any, what: str) -> list:
    """The value, if it is a list; ValueError otherwise."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {shown(value)}; expected a list")
    return value
