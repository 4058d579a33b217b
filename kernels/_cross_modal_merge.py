"""The runs' parts of what belongs to words, added in the order of the runs."""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._cross_modal_launch import Similarity
from magnet_fast.kernels._runtime import rounded
from torch import Tensor


@triton.jit
def _merge_kernel(
    maximum_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous
    total_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous
    partial_ptr,  # (B, h, runs, BLOCK_T, width) float32, contiguous
    mask_ptr,  # (B, T) uint8, contiguous
    out_ptr,  # (B, T, h * width), contiguous, out
    words,
    heads,
    runs,
    blocks,
    width,
    factor,
    HAS_MASK: tl.constexpr,
    NORMALIZE: tl.constexpr,  # partial sums of a softmax, else plain ones times `factor`
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,  # at least `runs`
    BLOCK_E: tl.constexpr,
):
    """BLOCK_E of a head's (T, width) numbers: the runs' partial sums added in a fixed order. Masked words become 0."""
    index = tl.program_id(0).to(tl.int64)
    element = (index % blocks).to(tl.int32) * BLOCK_E + tl.arange(0, BLOCK_E)
    head = index // blocks % heads
    image = index // blocks // heads
    run = tl.arange(0, BLOCK_R)
    word, exists = element // width, element < words * width
    is_run = (run < runs)[:, None] & exists[None, :]
    partial_ptr += (image * heads + head) * runs * BLOCK_T * width
    sums = tl.load(partial_ptr + run[:, None] * (BLOCK_T * width) + element[None, :], mask=is_run, other=0.0)
    if NORMALIZE:
        row = ((image * heads + head) * BLOCK_T + word[None, :]) * runs + run[:, None]
        maximum = tl.load(maximum_ptr + row, mask=is_run, other=float("-inf"))
        total = tl.load(total_ptr + row, mask=is_run, other=0.0)
        largest = tl.max(maximum, 0)
        kept = tl.exp2(maximum - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
        out = tl.sum(sums * kept, 0) / tl.sum(total * kept, 0)
    else:
        out = tl.sum(sums, 0) * factor
    if HAS_MASK:
        out = tl.where(tl.load(mask_ptr + image * words + word, mask=exists, other=0) != 0, out, 0.0)
    out_ptr += (image * words + word) * heads * width + head * width + element % width
    tl.store(out_ptr, rounded(out, out_ptr.dtype.element_ty), mask=exists)


def merge(
    similarity: Similarity,
    partial: Tensor,
    out: Tensor,
    *,
    maximum: Tensor | None = None,
    total: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Adds the runs' parts (B, h, runs, BLOCK_T, width) into `out` (B, T, h * width), as parts of a softmax when its
    statistics are given, else as they are, times `factor`."""
    this, (batch, words, channels) = similarity, out.shape
    width = channels // this.heads
    block_r = _runtime.power_of_two(this.runs, 1)
    block_e = min(_runtime.power_of_two(words * width), _LARGEST_MERGE // block_r)
    blocks = triton.cdiv(words * width, block_e)
    _merge_kernel[_runtime.grid(batch * this.heads * blocks)](
        maximum_ptr=partial if maximum is None else maximum,
        total_ptr=partial if total is None else total,
        partial_ptr=partial,
        mask_ptr=this.mask_or_placeholder,
        out_ptr=out,
        words=words,
        heads=this.heads,
        runs=this.runs,
        blocks=blocks,
        width=width,
        factor=factor,
        HAS_MASK=this.mask is not None,
        NORMALIZE=maximum is not None,
        BLOCK_T=this.block_t,
        BLOCK_R=block_r,
        BLOCK_E=block_e,
    )


# Numbers that one program of a merge holds.
_LARGEST_MERGE = 2048
