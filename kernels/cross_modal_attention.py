"""Cross-modal attention: pixels attend to words and words to pixels, from one pass over the pixels.

A program walks over a run of pixels of one head with the words on chip. The pixels' softmax is complete in a tile; the
words' is a reduction over all runs: each leaves its (maximum, total, weighted sum), and a merge adds them in the order
of the runs, so no float is ever added atomically. Where the runs end depends on the sizes of one image, not on the
batch.

*Narrow* heads, all channels of which fit on chip beside the words, take their products on the way. *Wide* ones, up to
1024 channels, would need more registers than there are: their products of pixels and words, T numbers a pixel, go
through memory (`_cross_modal_wide`), and the walks then take one block of channels each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._cross_modal_backward import backward
from magnet_fast.kernels._cross_modal_launch import Similarity, rows, walks
from magnet_fast.kernels._cross_modal_merge import merge
from magnet_fast.kernels._cross_modal_tiles import LOG2_E, load_rows, pixel_weights, store_rows, words_of
from magnet_fast.kernels._cross_modal_wide import product
from magnet_fast.kernels._runtime import dot, rounded
from torch import Tensor


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


_FORWARD = _runtime.Autotuner(walks, _forward_kernel)


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that `report` compiles, on meta tensors: few and many words, narrow and wide heads.

    The models' heads also with either direction alone; separate similarities are one of each.
    """
    sizes = [(20, 32, 8), (20, 1024, 1), (1, 8, 8), (5, 64, 4), (22, 128, 1), (64, 32, 8), (40, 1024, 1)]
    for words, d, heads in sizes[:1] if quick else sizes:
        pixels = 14400 if d < 256 else 900

        def rows_of(count: int, width: int = heads * d) -> Tensor:
            return torch.empty(2, count, width, dtype=dtype, device="meta")

        mask = torch.empty(2, words, dtype=torch.uint8, device="meta")
        image, text = rows_of(pixels), rows_of(words)
        for form in ["both", "image", "text"] if (words, d, heads) in sizes[:2] and not quick else ["both"]:
            values = (text if form != "text" else None, image if form != "image" else None)
            call = functools.partial(Similarity, image, text, *values, mask, heads, d**-0.5)
            label = f"{form}, T {words}, d {d}"
            yield label, functools.partial(forward, call())
            grads = (image if form != "text" else None, text if form != "image" else None)
            wanted = (True, True, form != "text", form != "image")
            yield label, functools.partial(backward, call(backward=True), *grads, wanted)
