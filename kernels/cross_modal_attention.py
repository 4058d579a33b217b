"""Cross-modal attention: pixels attend to words and words to pixels, from one pass over the pixels.

A program walks over a run of pixels of one head with the words on chip. The pixels' softmax is complete in a tile; the
words' is a reduction over all runs: each leaves its (maximum, total, weighted sum), and a merge adds them in the order
of the runs, so no float is ever added atomically. Where the runs end depends on the sizes of one image, not on the
batch.

*Narrow* heads, all channels of which fit on chip beside the words, take their products on the way. *Wide* ones, up to
1024 channels, would need more registers than there are: their products of pixels and words, T numbers a pixel, go
through memory (:mod:`._cross_modal_wide`), and the walks then take one block of channels each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _runtime
from ._cross_modal_launch import Similarity, rows, walks
from ._cross_modal_tiles import LOG2_E, load_rows, pixel_weights, store_rows, words_of
from ._cross_modal_wide import product
from ._runtime import dot, rounded


@triton.jit
def _forward_kernel(
    pixel_ptr,  # (B, P, h * width): image_query or image_key, whose products with `word` are the scores
    word_ptr,  # (B, T, h * width): text_key or text_query
    text_value_ptr,  # (B, T, h * text_width)
    image_value_ptr,  # (B, P, h * image_width)
    mask_ptr,  # (B, T) uint8, contiguous
    products_ptr,  # (B, h, P, BLOCK_T) float32, contiguous: those of a wide head
    image_out_ptr,  # (B, P, h * text_width), contiguous, out
    maximum_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous, out: largest score of a run, in powers of 2
    total_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous, out: sum of 2^(score - maximum)
    partial_ptr,  # (B, h, runs, BLOCK_T, image_width) float32, contiguous, out: the weighted sum of image_value
    pixel_batch,
    pixel_stride,
    word_batch,
    word_stride,
    text_value_batch,
    text_value_stride,
    image_value_batch,
    image_value_stride,
    pixels,
    words,
    heads,
    runs,
    run_pixels,
    blocks,
    width,
    text_width,
    image_width,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_IMAGE: tl.constexpr,  # image_out is wanted; never beside WIDE
    HAS_TEXT: tl.constexpr,  # the words' partial sums are
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A run of pixels: image_out, and the run's part of text_out. Wide heads: the latter, of one block of channels."""
    index = tl.program_id(0).to(tl.int64)
    block = (index % blocks).to(tl.int32)
    head = index // blocks % heads
    run = index // blocks // heads % runs
    image = index // blocks // heads // runs
    first, last = run * run_pixels, tl.minimum((run + 1) * run_pixels, pixels)
    is_word = words_of(mask_ptr, image, words, HAS_MASK, BLOCK_T)
    word = tl.arange(0, BLOCK_T)
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    pixel_ptr += image * pixel_batch + head * width
    word_ptr += image * word_batch + head * width
    image_value_ptr += image * image_value_batch + head * image_width
    products_ptr += (image * heads + head) * pixels * BLOCK_T

    if not WIDE:
        word_rows = tl.trans(load_rows(word_ptr, word_stride, 0, word, is_word, channel, channel < width))
    if HAS_IMAGE:
        text_value_ptr += image * text_value_batch + head * text_width
        image_out_ptr += image * pixels * heads * text_width + head * text_width
        text_value = load_rows(text_value_ptr, text_value_stride, 0, word, is_word, channel, channel < text_width)
    maximum = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    gathered = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    pixel = tl.arange(0, BLOCK_P)
    for start in range(first, last, BLOCK_P):
        is_pixel = pixel < last - start
        if WIDE:
            scores = load_rows(products_ptr, BLOCK_T, start, pixel, is_pixel, word, word < BLOCK_T)
        else:
            pixel_rows = load_rows(pixel_ptr, pixel_stride, start, pixel, is_pixel, channel, channel < width)
            scores = dot(pixel_rows, word_rows, None, PRECISION)
        scores *= scale * LOG2_E
        if HAS_IMAGE:
            weights = rounded(pixel_weights(scores, is_word), text_value.dtype)
            out = dot(weights, text_value, None, PRECISION)
            store_rows(image_out_ptr, heads * text_width, start, pixel, is_pixel, channel, channel < text_width, out)
        if HAS_TEXT:
            scores = tl.where(is_pixel[:, None], scores, float("-inf"))
            larger = tl.maximum(maximum, tl.max(scores, 0))
            # Scores of -inf alone, so far, would make -inf - -inf.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            weights, kept = tl.exp2(scores - base[None, :]), tl.exp2(maximum - base)
            total = total * kept + tl.sum(weights, 0)
            rows = load_rows(
                image_value_ptr, image_value_stride, start, pixel, is_pixel, channel, channel < image_width
            )
            gathered = dot(tl.trans(rounded(weights, rows.dtype)), rows, gathered * kept[:, None], PRECISION)
            maximum = larger
    if HAS_TEXT:
        row = ((image * heads + head) * BLOCK_T + word) * runs + run
        if block == 0:  # every block of channels has the same statistics
            tl.store(maximum_ptr + row, maximum)
            tl.store(total_ptr + row, total)
        partial_ptr += ((image * heads + head) * runs + run) * BLOCK_T * image_width
        store_rows(partial_ptr, image_width, 0, word, is_word, channel, channel < image_width, gathered)


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


def forward(similarity: Similarity) -> tuple[Tensor | None, Tensor | None]:
    """image_out (B, P, h * text_width) and text_out (B, T, h * image_width), None without text_value or image_value.

    What masked rows hold is not read, and their rows of text_out are 0.
    """
    this, image_out, text_out = similarity, None, None
    (batch, pixels), (_, text_width, image_width) = this.pixel.shape[:2], this.widths
    if this.text_value is not None:
        image_out = this.pixel.new_empty(batch, pixels, this.heads * text_width)
    products = None
    if this.wide:
        products = product(this, this.pixel, this.word, image_out, store=this.image_value is not None)
    if not this.wide or this.image_value is not None:
        maximum, total, partial = this.statistics(), this.statistics(), this.partials(max(image_width, 1))

        def launch(config: triton.Config) -> None:
            _forward_kernel[_runtime.grid(batch * this.heads * this.runs * this.blocks)](
                **rows("pixel", this.pixel, this.pixel),
                **rows("word", this.word, this.pixel),
                **rows("text_value", this.text_value, this.pixel),
                **rows("image_value", this.image_value, this.pixel),
                mask_ptr=this.mask_or_placeholder,
                products_ptr=maximum if products is None else products,
                image_out_ptr=this.pixel if image_out is None else image_out,
                maximum_ptr=maximum,
                total_ptr=total,
                partial_ptr=partial,
                **this.sizes(),
                **this.walk_sizes("width", "text_width", "image_width"),
                blocks=this.blocks,
                WIDE=this.wide,
                HAS_IMAGE=image_out is not None and not this.wide,
                HAS_TEXT=this.image_value is not None,
                **config.all_kwargs(),
            )

        tiles = 1 + (this.image_value is not None)
        _FORWARD(launch, this.pixel.device, *this.key(tiles), image_out is None, this.image_value is None)
    if this.image_value is not None:
        text_out = this.pixel.new_empty(batch, this.word.shape[1], this.heads * image_width)
        merge(this, partial, text_out, maximum=maximum, total=total)
    return image_out, text_out


def merge(
    similarity: Similarity,
    partial: Tensor,
    out: Tensor,
    *,
    maximum: Tensor | None = None,
    total: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Adds the runs' parts (B, h, runs, BLOCK_T, width) into ``out`` (B, T, h * width), as parts of a softmax when its
    statistics are given, else as they are, times ``factor``."""
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
_LARGEST_MERGE = 4096

_FORWARD = _runtime.Autotuner(walks, _forward_kernel)
