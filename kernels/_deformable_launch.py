"""Host side of the deformable kernels: the points of one call, and how its work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import triton
from magnet_fast.kernels import _runtime
from torch import Tensor

# Numbers of a tile (queries, points, channels), for each warp. One corner's values are one such tile.
_TILE_OF_WARP, _WARPS = 512, 4


@dataclass(frozen=True)
class Points:
    """The points of every query. All tensors but value have what belongs to one head (and one query) contiguous."""

    value: Tensor  # (B, S, h, d), the last dimension contiguous
    places: Tensor  # (B, Q, h, L, K, 2): locations; offsets beside a reference
    weights: Tensor  # (B, Q, h, L, K); logits beside a reference
    reference: Tensor | None  # (B, Q, L, 2 or 4), the last dimension contiguous
    sizes: Sequence[int]  # H0, W0, H1, W1, ...

    @property
    def counts(self) -> tuple[int, int, int]:
        """Batch, queries, heads."""
        return self.places.shape[:3]

    @property
    def width(self) -> int:
        return self.value.shape[3]

    @property
    def total(self) -> int:
        """Points of a query and head."""
        return self.places.shape[3] * self.places.shape[4]

    @cached_property
    def block_p(self) -> int:
        return _runtime.power_of_two(self.total, 1)

    @cached_property
    def block_d(self) -> int:
        return min(_runtime.power_of_two(self.width), 64)

    def point_arguments(self) -> dict[str, Tensor | int | bool | tuple[int, ...]]:
        """Arguments of every kernel that asks where the points lie."""
        _, queries, heads = self.counts
        reference = self.reference if self.reference is not None else self.places
        strides = reference.stride()[:3] if self.reference is not None else (0, 0, 0)
        return {
            "places_ptr": self.places,
            "weights_ptr": self.weights,
            "reference_ptr": reference,
            **dict(zip(("places_batch", "places_stride", "places_head"), self.places.stride(), strict=False)),
            **dict(zip(("weights_batch", "weights_stride", "weights_head"), self.weights.stride(), strict=False)),
            **dict(zip(("reference_batch", "reference_query", "reference_level"), strides, strict=True)),
            "queries": queries,
            "heads": heads,
            "maps": tuple(self.sizes),
            "LEVELS": self.places.shape[3],
            "POINTS": self.places.shape[4],
            "FUSED": self.reference is not None,
            "BOXES": self.reference is not None and self.reference.shape[3] == 4,
            "BLOCK_P": self.block_p,
        }

    def value_arguments(self) -> dict[str, Tensor | int]:
        """Arguments of the kernels that read `value`."""
        strides = dict(zip(("value_batch", "value_stride", "value_head"), self.value.stride(), strict=False))
        return {"value_ptr": self.value, **strides, "width": self.width, "BLOCK_D": self.block_d}

    def key(self) -> tuple[object, ...]:
        """What a configuration is chosen by."""
        dtypes = (self.value.dtype, self.places.dtype, self.weights.dtype)
        return (self.block_p, self.block_d, self.total, self.width, self.counts[2], self.reference is not None, *dtypes)


def gathers(block_p: int, block_d: int, *_: object) -> list[triton.Config]:
    """Configurations of a kernel that reads the corners of all points of some queries, for a key of `Points.key`."""
    return _tiles(block_p, block_d, _TILE_OF_WARP)


def gathers_backward(block_p: int, block_d: int, *_: object) -> list[triton.Config]:
    """The same for the backward pass, which holds more beside a tile."""
    return _tiles(block_p, block_d, _TILE_OF_WARP if block_d <= 32 else _TILE_OF_WARP // 2)


def _tiles(block_p: int, block_d: int, largest: int) -> list[triton.Config]:
    """Of so many numbers of a warp, and of half as many."""
    found = dict.fromkeys(max(1, tile * _WARPS // (block_p * block_d)) for tile in (largest, largest // 2))
    return [triton.Config({"BLOCK_Q": block_q}, num_warps=_WARPS, num_stages=1) for block_q in found]
