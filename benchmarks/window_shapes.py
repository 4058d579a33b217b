"""Shapes of window attention in Swin, and what one run of each cannot do without: bytes and operations."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

MODELS = {"Swin-T": (96, 3), "Swin-B": (128, 4)}  # channels and heads of the first stage


class Shape(NamedTuple):
    model: str
    side: int
    stage: int
    window: int
    shifted: bool

    @property
    def shift(self) -> int:
        return self.window // 2 if self.shifted else 0

    @property
    def extent(self) -> int:
        """Side of the map."""
        return -(-self.side // (2 << self.stage))

    @property
    def channels(self) -> int:
        return MODELS[self.model][0] << (self.stage - 1)

    @property
    def heads(self) -> int:
        return MODELS[self.model][1] << (self.stage - 1)

    def __str__(self) -> str:
        kind = "shifted" if self.shifted else "unshifted"
        return f"{self.model} {self.side} stage {self.stage} w {self.window} {kind}"

    def operations(self) -> int:
        """2 for every multiplication and addition that one product of the forward pass needs."""
        padded = -(-self.extent // self.window) * self.window
        # Along one axis: (window, region) -> real tokens, padded tokens.
        real: Counter[tuple[int, int]] = Counter()
        padding: Counter[tuple[int, int]] = Counter()
        for at in range(padded):
            region = (at >= padded - self.window) + (at >= padded - self.shift) if self.shifted else 0
            tokens = real if (at + self.shift) % padded < self.extent else padding
            tokens[at // self.window, region] += 1
        pairs = 0
        groups = real.keys() | padding.keys()
        for row in groups:
            for column in groups:
                queries = real[row] * real[column]
                tokens = (real[row] + padding[row]) * (real[column] + padding[column])
                pairs += queries * (queries + (tokens > queries))
        return 2 * pairs * self.channels


def traffic(shape: Shape, dtype: torch.dtype, backward: bool, batch: int = 1) -> dict[str, int]:
    """What one run cannot do without: "bytes" read or written once, "flops" of its products; `bench_window_attention`
    derives them."""
    numbers = batch * shape.extent**2 * shape.channels
    return {
        "bytes": (4 + 7 * backward) * numbers * dtype.itemsize,
        "flops": (2 + 5 * backward) * batch * shape.operations(),
    }
