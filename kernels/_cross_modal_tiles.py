"""What the kernels of cross-modal attention share: rows of channels, words, weights, products."""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels._runtime import dot, rounded

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, stride, first, row, row_mask, channel, channel_mask):
    """Channels of the rows first + row, (rows, channels); zeros where a mask is false, which is never read.

    Within a tile offsets have 32 bits, which saves registers (the caller copies what has longer strides); to its first
    row they have 64.
    """
    offsets = row[:, None] * stride + channel[None, :]
    return tl.load(ptr + first * stride + offsets, mask=row_mask[:, None] & channel_mask[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride, first, row, row_mask, channel, channel_mask, rows):
    offsets = row[:, None] * stride + channel[None, :]
    tl.store(
        ptr + first * stride + offsets,
        rounded(rows, ptr.dtype.element_ty),
        mask=row_mask[:, None] & channel_mask[None, :],
    )


@triton.jit
def words_of(mask_ptr, image, words, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which of BLOCK_T rows are words, (BLOCK_T,)."""
    word = tl.arange(0, BLOCK_T)
    is_word = word < words
    if HAS_MASK:
        is_word = tl.load(mask_ptr + image * words + word, mask=is_word, other=0) != 0
    return is_word


@triton.jit
def pixel_weights(scores, is_word):
    """Softmax over the words of scores in powers of 2, (pixels, BLOCK_T). All 0 in a sentence without any word."""
    scores = tl.where(is_word[None, :], scores, float("-inf"))
    maximum = tl.max(scores, 1)
    some = tl.max(is_word.to(tl.int32), 0) != 0
    maximum = tl.where(some, maximum, 0.0)
    weights = tl.exp2(scores - maximum[:, None])
    total = tl.where(some, tl.sum(weights, 1), 1.0)
    return weights / total[:, None]


@triton.jit
def merged_statistics(
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    slot,
    runs,
    SCORES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The runs' statistics of one head put together, each (BLOCK_T,): log2 of the sum of 2^score over all pixels, and
    the mean, by weight, of the weights' gradient (0 unless SCORES)."""
    word, run = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    maximum = load_rows(maximum_ptr + slot * BLOCK_T * runs, runs, 0, word, word < BLOCK_T, run, run < runs)
    total = load_rows(total_ptr + slot * BLOCK_T * runs, runs, 0, word, word < BLOCK_T, run, run < runs)
    maximum = tl.where((run < runs)[None, :], maximum, float("-inf"))
    largest = tl.max(maximum, 1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    kept = tl.exp2(maximum - base[:, None])
    total = tl.sum(total * kept, 1)
    mean = tl.zeros([BLOCK_T], tl.float32)
    if SCORES:
        weighted = load_rows(weighted_ptr + slot * BLOCK_T * runs, runs, 0, word, word < BLOCK_T, run, run < runs)
        mean = tl.sum(weighted * kept, 1) / total
    return base + tl.log2(total), mean


@triton.jit
def tile_products(
    left_ptr,
    right_ptr,
    left_stride,
    right_stride,
    first,
    is_pixel,
    is_word,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of a tile of pixels with the words over all channels, block by block: (BLOCK_P, BLOCK_T) float32."""
    products = tl.zeros([BLOCK_P, BLOCK_T], tl.float32)
    pixel, word = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_T)
    for start in range(0, width, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        left = load_rows(left_ptr, left_stride, first, pixel, is_pixel, channel, channel < width)
        right = load_rows(right_ptr, right_stride, 0, word, is_word, channel, channel < width)
        products = dot(left, tl.trans(right), products, PRECISION)
    return products
