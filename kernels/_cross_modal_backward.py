"""The backward pass of cross-modal attention: the words' statistics again, then all gradients in one walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._cross_modal_launch import Similarity, backward_walks, product_walks, rows
from magnet_fast.kernels._cross_modal_merge import merge
from magnet_fast.kernels._cross_modal_tiles import (
    LOG2_E,
    load_rows,
    merged_statistics,
    pixel_weights,
    store_rows,
    words_of,
)
from magnet_fast.kernels._cross_modal_wide import Products
from magnet_fast.kernels._runtime import dot, rounded
from torch import Tensor


@triton.jit
def _statistics_kernel(
    pixel_ptr,  # (B, P, h * width)
    word_ptr,  # (B, T, h * width)
    image_value_ptr,  # (B, P, h * image_width)
    grad_text_ptr,  # (B, T, h * image_width): gradient of text_out
    mask_ptr,  # (B, T) uint8, contiguous
    products_ptr,  # (B, h, P, BLOCK_T) float32, contiguous: wide heads' products of pixel and word
    text_products_ptr,  # the same of image_value and grad_text
    maximum_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous, out
    total_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous, out
    weighted_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous, out: sum of 2^(score - maximum) * gradient of the weight
    pixel_batch,
    pixel_stride,
    word_batch,
    word_stride,
    image_value_batch,
    image_value_stride,
    grad_text_batch,
    grad_text_stride,
    pixels,
    words,
    heads,
    runs,
    run_pixels,
    width,
    image_width,
    scale,
    HAS_MASK: tl.constexpr,
    SCORES: tl.constexpr,  # the gradient of the scores is wanted, and with it `weighted`
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A run of pixels: what the words' softmax and its derivative need to know of all pixels."""
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    run = index // heads % runs
    image = index // heads // runs
    first, last = run * run_pixels, tl.minimum((run + 1) * run_pixels, pixels)
    is_word = words_of(mask_ptr, image, words, HAS_MASK, BLOCK_T)
    word = tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_D)
    pixel_ptr += image * pixel_batch + head * width
    image_value_ptr += image * image_value_batch + head * image_width
    products_ptr += (image * heads + head) * pixels * BLOCK_T
    text_products_ptr += (image * heads + head) * pixels * BLOCK_T

    if not WIDE:
        word_ptr += image * word_batch + head * width
        word_rows = tl.trans(load_rows(word_ptr, word_stride, 0, word, is_word, channel, channel < width))
        if SCORES:
            grad_text_ptr += image * grad_text_batch + head * image_width
            grad_text = load_rows(grad_text_ptr, grad_text_stride, 0, word, is_word, channel, channel < image_width)
            grad_text = tl.trans(grad_text)
    maximum = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    pixel = tl.arange(0, BLOCK_P)
    for start in range(first, last, BLOCK_P):
        is_pixel = pixel < last - start
        if WIDE:
            scores = load_rows(products_ptr, BLOCK_T, start, pixel, is_pixel, word, word < BLOCK_T)
        else:
            rows = load_rows(pixel_ptr, pixel_stride, start, pixel, is_pixel, channel, channel < width)
            scores = dot(rows, word_rows, None, PRECISION)
        scores = tl.where(is_pixel[:, None], scores * (scale * LOG2_E), float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights, kept = tl.exp2(scores - base[None, :]), tl.exp2(maximum - base)
        total = total * kept + tl.sum(weights, 0)
        maximum = larger
        if SCORES:
            if WIDE:
                grad_weights = load_rows(text_products_ptr, BLOCK_T, start, pixel, is_pixel, word, word < BLOCK_T)
            else:
                rows = load_rows(
                    image_value_ptr, image_value_stride, start, pixel, is_pixel, channel, channel < image_width
                )
                grad_weights = dot(rows, grad_text, None, PRECISION)
            weighted = weighted * kept + tl.sum(weights * grad_weights, 0)
    row = ((image * heads + head) * BLOCK_T + word) * runs + run
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    if SCORES:
        tl.store(weighted_ptr + row, weighted)


@triton.jit
def _backward_kernel(
    pixel_ptr,  # (B, P, h * width): image_query or image_key
    word_ptr,  # (B, T, h * width): text_key or text_query
    text_value_ptr,  # (B, T, h * text_width)
    image_value_ptr,  # (B, P, h * image_width)
    grad_image_ptr,  # (B, P, h * text_width): gradient of image_out
    grad_text_ptr,  # (B, T, h * image_width): gradient of text_out
    mask_ptr,  # (B, T) uint8, contiguous
    maximum_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous: of `_statistics_kernel`, as the next two
    total_ptr,
    weighted_ptr,
    grad_pixel_ptr,  # (B, P, h * width), contiguous, out
    grad_image_value_ptr,  # (B, P, h * image_width), contiguous, out
    word_sums_ptr,  # (B, h, runs, BLOCK_T, width) float32, contiguous, out: a run's part of the gradient of word
    text_value_sums_ptr,  # (B, h, runs, BLOCK_T, text_width) float32, contiguous, out: and of text_value
    pixel_batch,
    pixel_stride,
    word_batch,
    word_stride,
    text_value_batch,
    text_value_stride,
    image_value_batch,
    image_value_stride,
    grad_image_batch,
    grad_image_stride,
    grad_text_batch,
    grad_text_stride,
    pixels,
    words,
    heads,
    runs,
    run_pixels,
    width,
    text_width,
    image_width,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_IMAGE: tl.constexpr,  # a gradient of image_out came
    HAS_TEXT: tl.constexpr,  # a gradient of text_out came
    WANT_PIXEL: tl.constexpr,
    WANT_WORD: tl.constexpr,
    WANT_TEXT_VALUE: tl.constexpr,  # never without HAS_IMAGE
    WANT_IMAGE_VALUE: tl.constexpr,  # never without HAS_TEXT
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # at least `runs`
    PRECISION: tl.constexpr,
):
    """A run of pixels of a narrow head: the pixels' gradients, and the run's part of the words'.

    With W and V the weights of the two directions and G their gradients, the scores' gradient is
    W * (G_W - rowsum(W * G_W)) + V * (G_V - columnsum(V * G_V)).
    """
    SCORES: tl.constexpr = WANT_PIXEL or WANT_WORD
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    run = index // heads % runs
    image = index // heads // runs
    first, last = run * run_pixels, tl.minimum((run + 1) * run_pixels, pixels)
    is_word = words_of(mask_ptr, image, words, HAS_MASK, BLOCK_T)
    word = tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_D)
    slot = image * heads + head
    pixel_ptr += image * pixel_batch + head * width
    grad_pixel_ptr += image * pixels * heads * width + head * width

    word_ptr += image * word_batch + head * width
    word_rows = load_rows(word_ptr, word_stride, 0, word, is_word, channel, channel < width)
    if HAS_IMAGE:
        text_value_ptr += image * text_value_batch + head * text_width
        grad_image_ptr += image * grad_image_batch + head * text_width
        text_value = load_rows(text_value_ptr, text_value_stride, 0, word, is_word, channel, channel < text_width)
    if HAS_TEXT:
        image_value_ptr += image * image_value_batch + head * image_width
        grad_image_value_ptr += image * pixels * heads * image_width + head * image_width
        grad_text_ptr += image * grad_text_batch + head * image_width
        grad_text = load_rows(grad_text_ptr, grad_text_stride, 0, word, is_word, channel, channel < image_width)
        log_total, mean = merged_statistics(maximum_ptr, total_ptr, weighted_ptr, slot, runs, SCORES, BLOCK_T, BLOCK_R)
    grad_word = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    grad_text_value = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    pixel = tl.arange(0, BLOCK_P)
    for start in range(first, last, BLOCK_P):
        is_pixel = pixel < last - start
        pixel_rows = load_rows(pixel_ptr, pixel_stride, start, pixel, is_pixel, channel, channel < width)
        scores = dot(pixel_rows, tl.trans(word_rows), None, PRECISION) * (scale * LOG2_E)
        grad_scores = tl.zeros([BLOCK_P, BLOCK_T], tl.float32)
        if HAS_IMAGE:
            weights = pixel_weights(scores, is_word)
            rows = load_rows(grad_image_ptr, grad_image_stride, start, pixel, is_pixel, channel, channel < text_width)
            if SCORES:
                grads = dot(rows, tl.trans(text_value), None, PRECISION)
                grad_scores += weights * (grads - tl.sum(weights * grads, 1)[:, None])
            if WANT_TEXT_VALUE:
                grad_text_value = dot(tl.trans(rounded(weights, rows.dtype)), rows, grad_text_value, PRECISION)
        if HAS_TEXT:
            weights = tl.exp2(scores - log_total[None, :])
            if SCORES:
                rows = load_rows(
                    image_value_ptr, image_value_stride, start, pixel, is_pixel, channel, channel < image_width
                )
                grads = dot(rows, tl.trans(grad_text), None, PRECISION)
                grad_scores += weights * (grads - mean[None, :])
            if WANT_IMAGE_VALUE:
                out = dot(rounded(weights, grad_text.dtype), grad_text, None, PRECISION)
                store_rows(
                    grad_image_value_ptr,
                    heads * image_width,
                    start,
                    pixel,
                    is_pixel,
                    channel,
                    channel < image_width,
                    out,
                )
        if SCORES:
            grad_scores = rounded(grad_scores, word_rows.dtype)
        if WANT_PIXEL:
            out = dot(grad_scores, word_rows, None, PRECISION) * scale
            store_rows(grad_pixel_ptr, heads * width, start, pixel, is_pixel, channel, channel < width, out)
        if WANT_WORD:
            grad_word = dot(tl.trans(grad_scores), pixel_rows, grad_word, PRECISION)
    if WANT_WORD:
        word_sums_ptr += (slot * runs + run) * BLOCK_T * width
        store_rows(word_sums_ptr, width, 0, word, is_word, channel, channel < width, grad_word)
    if WANT_TEXT_VALUE:
        text_value_sums_ptr += (slot * runs + run) * BLOCK_T * text_width
        store_rows(text_value_sums_ptr, text_width, 0, word, is_word, channel, channel < text_width, grad_text_value)


def backward(
    similarity: Similarity, grad_image: Tensor | None, grad_text: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of pixel, word, text_value and image_value, None for those not wanted.

    Args:
        grad_image, grad_text: gradients of image_out and text_out, with a contiguous last dimension; not both None.
        wanted: which of the four. text_value only beside grad_image, image_value only beside grad_text.
    """
    this, batch, (width, text_width, _) = similarity, similarity.pixel.shape[0], similarity.widths
    given, contiguous = (this.pixel, this.word, this.text_value, this.image_value), torch.contiguous_format
    grads = [torch.empty_like(t, memory_format=contiguous) if w else None for t, w in zip(given, wanted, strict=True)]
    # Pointers that a kernel does not follow need a dtype all the same.
    nothing = this.scratch(1)
    scores = wanted[0] or wanted[1]
    products = Products(this, grad_image, grad_text, scores) if this.wide else None
    inputs = {
        **rows("pixel", this.pixel, this.pixel),
        **rows("word", this.word, this.pixel),
        **rows("image_value", this.image_value, this.pixel),
        **rows("grad_text", grad_text, this.pixel),
        "mask_ptr": this.mask_or_placeholder,
    }
    maximum = total = weighted = nothing
    if grad_text is not None:
        maximum, total, weighted = this.statistics(), this.statistics(), this.statistics()

        def launch_statistics(config: triton.Config) -> None:
            _statistics_kernel[_runtime.grid(batch * this.heads * this.runs)](
                **inputs,
                products_ptr=nothing if products is None else products.scores,
                text_products_ptr=nothing if products is None or not scores else products.text,
                maximum_ptr=maximum,
                total_ptr=total,
                weighted_ptr=weighted,
                **this.sizes(),
                **this.walk_sizes("width", "image_width"),
                SCORES=scores,
                WIDE=this.wide,
                **config.all_kwargs(),
            )

        _STATISTICS(launch_statistics, this.pixel.device, *this.key(1 + scores), scores)
    statistics = {"maximum_ptr": maximum, "total_ptr": total, "weighted_ptr": weighted}
    if products is not None:
        products.to_weights(statistics, grad_image is not None, grad_text is not None, wanted)

    word_sums = this.partials(width) if wanted[1] else nothing
    text_value_sums = this.partials(text_width) if wanted[2] else nothing
    inputs |= {
        **rows("grad_image", grad_image, this.pixel),
        "grad_pixel_ptr": this.pixel if grads[0] is None else grads[0],
        "grad_image_value_ptr": this.pixel if grads[3] is None else grads[3],
        "word_sums_ptr": word_sums,
        "text_value_sums_ptr": text_value_sums,
        **this.sizes(),
        **this.walk_sizes("width", "text_width", "image_width"),
        **dict(zip(_WANTS, wanted, strict=True)),
    }

    def launch(config: triton.Config) -> None:
        _backward_kernel[_runtime.grid(batch * this.heads * this.runs)](
            **inputs,
            **rows("text_value", this.text_value, this.pixel),
            **statistics,
            HAS_IMAGE=grad_image is not None,
            HAS_TEXT=grad_text is not None,
            BLOCK_R=_runtime.power_of_two(this.runs, 1),
            **config.all_kwargs(),
        )

    if products is not None:
        products.apply({name: value for name, value in inputs.items() if not name.startswith("image_value")})
    else:
        _BACKWARD(launch, this.pixel.device, *this.key(3), grad_image is None, grad_text is None, *wanted)
    if wanted[1]:
        merge(this, word_sums, grads[1], factor=this.scale)
    if wanted[2]:
        merge(this, text_value_sums, grads[2])
    return tuple(grads)


_WANTS = ("WANT_PIXEL", "WANT_WORD", "WANT_TEXT_VALUE", "WANT_IMAGE_VALUE")

_STATISTICS = _runtime.Autotuner(product_walks, _statistics_kernel)
_BACKWARD = _runtime.Autotuner(backward_walks, _backward_kernel)
