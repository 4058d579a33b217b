"""Segmentations given straight to the decoder: RLE strings and counts, polygons, odd sizes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from magnet_fast.data.polygons import mask_to_polygons
from magnet_fast.data.segmentation import check_segmentation, decode_segmentation, draw_segmentation, encode_mask
from tests.fuzz.annotations import Fuzz, independent_mask
from tests.fuzz.target import READ, Finding, Target, outcome_of

_SIDES = [1, 2, 18, 24, 500]


class FuzzTarget(Target):
    """A mask that a slow reading of the same segmentation gives, too, or a ValueError."""

    quick: ClassVar[int] = 300
    batch: ClassVar[int] = 5000
    long: ClassVar[int] = 100_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.there_and_back()

    def there_and_back(self) -> None:
        """Everything is imported before anything is watched."""
        mask = np.eye(5, dtype=bool)
        decode_segmentation(encode_mask(mask), 5, 5)
        decode_segmentation(mask_to_polygons(mask), 5, 5)

    def try_one(self, draw: random.Random) -> str:
        if draw.random() < 0.1:
            return self._both_ways(draw)
        fuzz = Fuzz(draw.getrandbits(64))
        height, width = (18, 24) if draw.random() < 0.8 else (draw.choice(_SIDES), draw.choice(_SIDES))
        plain = fuzz.segmentation(height, width)
        segmentation = self._bytes(draw, plain)
        found: list[np.ndarray] = []
        outcome = outcome_of(lambda: found.append(decode_segmentation(segmentation, height, width)))
        again = outcome_of(lambda: check_segmentation(segmentation, height, width))
        if again != outcome:
            raise Finding(f"decoding gives {outcome!r}, checking {again!r}")
        if outcome == READ:
            if not np.array_equal(found[0], independent_mask(plain, height, width)):
                raise Finding("another mask than that of a slow reading")
            size = draw.choice([(1, 1), (7, 50), (height, width)])
            drawn = draw_segmentation(segmentation, height, width, size)
            if drawn.shape != size or drawn.max(initial=0) > 1:
                raise Finding(f"a mask of shape {drawn.shape} drawn at {size}")
        return outcome

    def _bytes(self, draw: random.Random, node: Any) -> Any:
        """pycocotools gives counts as bytes."""
        if isinstance(node, dict) and isinstance(node.get("counts"), str) and draw.random() < 0.3:
            return {**node, "counts": node["counts"].encode("latin1", "replace")}
        return node

    def _both_ways(self, draw: random.Random) -> str:
        shape = draw.randint(1, 20), draw.randint(1, 20)
        share = draw.choice([0, 5, 50, 95, 100])
        mask = np.array([[draw.randrange(100) < share for _ in range(shape[1])] for _ in range(shape[0])], dtype=bool)
        if not np.array_equal(decode_segmentation(encode_mask(mask), *shape), mask):
            raise Finding("RLE written and read is another mask")
        if mask.any() and not np.array_equal(decode_segmentation(mask_to_polygons(mask), *shape), mask):
            raise Finding("polygons written and read are another mask")
        return READ
