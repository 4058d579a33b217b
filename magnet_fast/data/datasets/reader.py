"""What every data set's reader offers: refs, their sentences, images and masks. One reader a format, one file each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Sentence:
    """One expression.

    Attributes:
        sent_id: as the data name it.
        raw: as its author typed it.
        sent: cleaned.
        tokens: as the data split it.
        kind: kind of sentence, such as "relation"; None where the data do not say.
        exists: whether it names anything in the image; False for a sentence made to fit nothing.
    """

    sent_id: int
    raw: str
    sent: str
    tokens: tuple[str, ...]
    kind: str | None = None
    exists: bool = True


@dataclass(frozen=True)
class Ref:
    """What sentences name, and these sentences.

    Attributes:
        ref_id: as the data name it.
        ann_ids: annotations whose union is the mask: one, several, or none for a ref without target.
        image_id: id of its image.
        category_id: COCO's category; None where unknown, or where several are.
        split: the name of its split.
        sentences: at least one.
    """

    ref_id: int
    ann_ids: tuple[int, ...]
    image_id: int
    category_id: int | None
    split: str
    sentences: tuple[Sentence, ...]


class Reader(Protocol):
    """A data set on disk, checked as it is opened. Errors name file and record."""

    source: Path
    """The file that the refs come from, for messages."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, those of the field in their customary order, then the data's own."""

    def refs(self, split: str) -> list[Ref]:
        """The refs of one split in file order. Raises ValueError for a split that the data do not name."""

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width in pixels, as the data say."""

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError where it is absent, naming where it was looked for."""

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1: what the ref names; zeros for a sentence that does not exist."""

    def extra(self, ref: Ref, sentence: Sentence) -> dict[str, Tensor]:
        """Named tensors beside image and text that a part of a model may need; mostly none."""


@dataclass
class Tally:
    """Records that share a reason, counted, the first of them named.

    Attributes:
        reasons: reason -> how many.
        examples: reason -> the first `NAMED`, in words.
    """

    NAMED = 20

    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, record: str) -> None:
        """Count one more."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.NAMED:
            examples.append(record)

    def told(self, named: int = NAMED) -> list[str]:
        """A sentence for each reason: how many, why, and which are the first."""
        told = []
        for reason, count in self.reasons.items():
            first = self.examples[reason][:named]
            more = f"; and {count - len(first)} more" if count > len(first) else ""
            told.append(f"{count} record{'s' * (count != 1)}: {reason} ({'; '.join(first)}{more})")
        return told
