"""Host side of the cross-modal kernels: one similarity and what is read through it, and how its work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from magnet_fast.kernels import _runtime
from torch import Tensor

# Numbers of a tile (words, channels), by bytes of one, that registers have room for. A narrow head's tile has all of
# its channels: the forward pass holds two and an accumulator, the backward pass three and two. A wide head's has a
# block of them.
_NARROW, _NARROW_BACKWARD, _WIDE = {2: 4096, 4: 1024}, {2: 1024, 4: 512}, {2: 4096, 4: 2048}
_LARGEST_BLOCK = 128
# Pixels of a run are a multiple of this, so that every BLOCK_P cuts runs at the same place.
_RUN_STEP = 128
# Programs that one image should give, for a large GPU at batch 1; and the runs that one merge takes.
_PROGRAMS, _MOST_RUNS = 256, 64
# Maps beyond this many pixels choose as this one.
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class Similarity:
    """Pixels times words, read by pixels (text_value -> image_out), by words (image_value -> text_out) or by both.

    All tensors have a contiguous last dimension and any other strides.
    """

    pixel: Tensor  # (B, P, h * width): image_query or image_key
    word: Tensor  # (B, T, h * width): text_key or text_query
    text_value: Tensor | None  # (B, T, h * text_width)
    image_value: Tensor | None  # (B, P, h * image_width)
    mask: Tensor | None  # (B, T) uint8, contiguous
    heads: int
    scale: float
    backward: bool = False  # for which pass

    @cached_property
    def widths(self) -> tuple[int, int, int]:
        """Channels of one head: of the similarity, of text_value and of image_value (0 without)."""
        tensors = (self.pixel, self.text_value, self.image_value)
        return tuple(0 if tensor is None else tensor.shape[2] // self.heads for tensor in tensors)

    @cached_property
    def block_t(self) -> int:
        return _runtime.power_of_two(self.word.shape[1])

    @cached_property
    def wide(self) -> bool:
        """Whether a tile of words with all channels of a head is too much for one program."""
        block = _runtime.power_of_two(max(self.widths))
        limits = _NARROW_BACKWARD if self.backward else _NARROW
        return block > _LARGEST_BLOCK or block * self.block_t > limits[self.pixel.element_size()]

    @cached_property
    def block_d(self) -> int:
        if not self.wide:
            return _runtime.power_of_two(max(self.widths))
        limit = _WIDE[self.pixel.element_size()] // self.block_t
        sizes = [size for size in (_LARGEST_BLOCK, 64, 32) if size <= limit]
        return min(sizes, key=lambda size: triton.cdiv(max(self.widths), size) * size)

    @cached_property
    def blocks(self) -> int:
        """Blocks of channels, each walked over by programs of its own."""
        return triton.cdiv(max(self.widths), self.block_d)

    @cached_property
    def run_pixels(self) -> int:
        pixels = self.pixel.shape[1]
        runs = max(1, min(_PROGRAMS // (self.heads * self.blocks), _MOST_RUNS))
        return triton.cdiv(triton.cdiv(pixels, runs), _RUN_STEP) * _RUN_STEP

    @cached_property
    def runs(self) -> int:
        return triton.cdiv(self.pixel.shape[1], self.run_pixels)

    def sizes(self) -> dict[str, int | float]:
        """Arguments of every kernel."""
        return {
            "pixels": self.pixel.shape[1],
            "words": self.word.shape[1],
            "heads": self.heads,
            "scale": self.scale,
            "HAS_MASK": self.mask is not None,
            "BLOCK_T": self.block_t,
            "PRECISION": _runtime.precision(self.pixel.dtype),
        }

    def walk_sizes(self, *widths: str) -> dict[str, int]:
        """Arguments of the kernels that walk over runs of pixels, and the widths of one head that they ask for."""
        named = dict(zip(("width", "text_width", "image_width"), self.widths, strict=True))
        cut = {"runs": self.runs, "run_pixels": self.run_pixels, "BLOCK_D": self.block_d}
        return cut | {name: named[name] for name in widths}

    def key(self, tiles: int) -> tuple[object, ...]:
        """What a configuration is chosen by; `tiles` of (BLOCK_P, block_d) are loaded in a step."""
        pixels = min(_runtime.power_of_two(self.pixel.shape[1]), _MOST_PIXELS)
        rest = (_runtime.precision(self.pixel.dtype), self.heads, self.wide, *self.widths, self.mask is None)
        return (self.pixel.dtype, pixels, self.block_t, self.block_d, tiles, *rest)

    @property
    def mask_or_placeholder(self) -> Tensor:
        return self.pixel if self.mask is None else self.mask

    def scratch(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.pixel.device)

    def partials(self, width: int) -> Tensor:
        """What each run adds to a tensor of the words: (B, h, runs, BLOCK_T, width)."""
        return self.scratch(self.pixel.shape[0], self.heads, self.runs, self.block_t, width)

    def statistics(self) -> Tensor:
        """A number of each word and run: (B, h, BLOCK_T, runs)."""
        return self.scratch(self.pixel.shape[0], self.heads, self.block_t, self.runs)


def rows(name: str, tensor: Tensor | None, placeholder: Tensor) -> dict[str, Tensor | int]:
    """A tensor's arguments of a kernel; one that is not there is never read, but its pointer needs a dtype."""
    if tensor is None:
        return {f"{name}_ptr": placeholder, f"{name}_batch": 0, f"{name}_stride": 0}
    return {f"{name}_ptr": tensor, f"{name}_batch": tensor.stride(0), f"{name}_stride": tensor.stride(1)}


def product_walks(
    dtype: torch.dtype, pixels: int, block_t: int, block_d: int, tiles: int, *_: object
) -> list[triton.Config]:
    """Configurations of a walk over pixels that makes products with words and little else, the best guess first, for a
    key of `Similarity.key`."""
    found = _fitting(4096 // block_t, dtype, block_d, tiles)
    # Three steps ahead of 64 channels in float32 spill on sm_80.
    return found[:1] if dtype == torch.float32 and block_d > 32 else found


def walks(dtype: torch.dtype, pixels: int, block_t: int, block_d: int, tiles: int, *_: object) -> list[triton.Config]:
    """The same for a walk that also reads words by them. float32 takes three pieces of each operand."""
    largest = min(1024 // block_t, 32) if dtype == torch.float32 else 4096 // block_t
    return _fitting(largest, dtype, block_d, tiles)


def apply_walks(
    dtype: torch.dtype, pixels: int, block_t: int, block_d: int, tiles: int, *_: object
) -> list[triton.Config]:
    """The same for a walk that does so twice, and adds to words as often."""
    return _fitting((512 if dtype == torch.float32 else 2048) // block_t, dtype, block_d, tiles)


def backward_walks(
    dtype: torch.dtype, pixels: int, block_t: int, block_d: int, tiles: int, *_: object
) -> list[triton.Config]:
    """The same for the narrow heads' backward pass, which holds most."""
    if dtype == torch.float32:  # one: smaller tiles spill, too
        return _fitting(32, dtype, block_d, tiles)[:1]
    return _fitting(min(1024 // block_t, 64), dtype, block_d, tiles)


def _fitting(largest: int, dtype: torch.dtype, block_d: int, tiles: int) -> list[triton.Config]:
    """Of at most `largest` pixels a step. Small maps leave a part of it idle: they have no programs of their own."""
    # What the loads ahead may take: the rest of 100 KB or more goes to the words and to exchanges.
    rows_ahead = _AHEAD_BYTES // (tiles * block_d * dtype.itemsize)
    found = [
        triton.Config({"BLOCK_P": block_p}, num_warps=warps, num_stages=stages)
        for block_p, warps, stages in ((64, 4, 2), (32, 4, 3), (16, 8, 2))
        if block_p <= largest and block_p * stages <= rows_ahead
    ]
    return found[:_MOST_CANDIDATES] or [triton.Config({"BLOCK_P": 16}, num_warps=4, num_stages=2)]


_AHEAD_BYTES = 64 * 1024
# Each is compiled, and timed at the first call.
_MOST_CANDIDATES = 2
