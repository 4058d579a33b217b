"""Cross-modal attention of wide heads: the products of pixels and words by way of memory.

With T words they are T numbers a pixel, beside its up to 1024 channels. The forward pass makes one such array at most
(pixels that read words need none); the backward pass makes up to three, turns them into the weights and the scores'
gradients, and then takes every block of channels on its own, with nothing left to do but products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._cross_modal_launch import Similarity, apply_walks, product_walks, rows
from magnet_fast.kernels._cross_modal_tiles import (
    LOG2_E,
    load_rows,
    merged_statistics,
    pixel_weights,
    store_rows,
    tile_products,
    words_of,
)
from magnet_fast.kernels._runtime import dot, rounded
from torch import Tensor


@triton.jit
def _product_kernel(
    left_ptr,  # (B, P, h * width): a tensor of the pixels
    right_ptr,  # (B, T, h * width): one of the words
    value_ptr,  # (B, T, h * value_width): text_value
    mask_ptr,  # (B, T) uint8, contiguous
    products_ptr,  # (B, h, P, BLOCK_T) float32, contiguous, out
    image_out_ptr,  # (B, P, h * value_width), contiguous, out
    left_batch,
    left_stride,
    right_batch,
    right_stride,
    value_batch,
    value_stride,
    pixels,
    words,
    heads,
    tiles,  # of BLOCK_P pixels, in an image
    width,
    value_width,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_IMAGE: tl.constexpr,  # image_out is wanted
    STORE: tl.constexpr,  # the products are
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Wide heads: left @ right^T of a tile of pixels, and image_out from them."""
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    tile = index // heads % tiles
    image = index // heads // tiles
    first, pixel = tile * BLOCK_P, tl.arange(0, BLOCK_P)
    is_pixel = pixel < pixels - first
    is_word = words_of(mask_ptr, image, words, HAS_MASK, BLOCK_T)
    word = tl.arange(0, BLOCK_T)

    products = tile_products(
        left_ptr + image * left_batch + head * width,
        right_ptr + image * right_batch + head * width,
        left_stride,
        right_stride,
        first,
        is_pixel,
        is_word,
        width,
        BLOCK_P,
        BLOCK_T,
        BLOCK_D,
        PRECISION,
    )
    if STORE:
        base = products_ptr + (image * heads + head) * pixels * BLOCK_T
        store_rows(base, BLOCK_T, first, pixel, is_pixel, word, word < BLOCK_T, products)
    if HAS_IMAGE:
        weights = rounded(pixel_weights(products * (scale * LOG2_E), is_word), value_ptr.dtype.element_ty)
        value_ptr += image * value_batch + head * value_width
        image_out_ptr += image * pixels * heads * value_width + head * value_width
        for start in range(0, value_width, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            value = load_rows(value_ptr, value_stride, 0, word, is_word, channel, channel < value_width)
            out = dot(weights, value, None, PRECISION)
            store_rows(image_out_ptr, heads * value_width, first, pixel, is_pixel, channel, channel < value_width, out)


@triton.jit
def _weights_kernel(
    mask_ptr,  # (B, T) uint8, contiguous
    products_ptr,  # (B, h, P, BLOCK_T) float32, contiguous: of pixel and word
    image_products_ptr,  # the same of the gradient of image_out and text_value, if SCORES and HAS_IMAGE
    text_products_ptr,  # the same of image_value and the gradient of text_out, if SCORES and HAS_TEXT
    maximum_ptr,  # (B, h, BLOCK_T, runs) float32, contiguous: statistics of the words' softmax, as the next two
    total_ptr,
    weighted_ptr,
    grad_scores_ptr,  # (B, h, P, BLOCK_T), contiguous, out if SCORES
    image_weights_ptr,  # (B, h, P, BLOCK_T), contiguous, out if WANT_TEXT_VALUE
    text_weights_ptr,  # (B, h, P, BLOCK_T), contiguous, out if WANT_IMAGE_VALUE
    pixels,
    words,
    heads,
    runs,
    tiles,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    SCORES: tl.constexpr,
    WANT_TEXT_VALUE: tl.constexpr,
    WANT_IMAGE_VALUE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of pixels of a wide head: the weights of both directions, and the gradient of the scores."""
    index = tl.program_id(0).to(tl.int64)
    slot, start = index // tiles, index % tiles * BLOCK_P
    pixel, word = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_T)
    is_pixel, every = pixel < pixels - start, word < BLOCK_T
    is_word = words_of(mask_ptr, slot // heads, words, HAS_MASK, BLOCK_T)
    first = slot * pixels + start
    scores = load_rows(products_ptr, BLOCK_T, first, pixel, is_pixel, word, every) * (scale * LOG2_E)
    grad_scores = tl.zeros([BLOCK_P, BLOCK_T], tl.float32)
    if HAS_IMAGE:
        weights = pixel_weights(scores, is_word)
        if SCORES:
            grads = load_rows(image_products_ptr, BLOCK_T, first, pixel, is_pixel, word, every)
            grad_scores += weights * (grads - tl.sum(weights * grads, 1)[:, None])
        if WANT_TEXT_VALUE:
            store_rows(image_weights_ptr, BLOCK_T, first, pixel, is_pixel, word, every, weights)
    if HAS_TEXT:
        log_total, mean = merged_statistics(maximum_ptr, total_ptr, weighted_ptr, slot, runs, SCORES, BLOCK_T, BLOCK_R)
        weights = tl.exp2(scores - log_total[None, :])
        if SCORES:
            grads = load_rows(text_products_ptr, BLOCK_T, first, pixel, is_pixel, word, every)
            grad_scores += weights * (grads - mean[None, :])
        if WANT_IMAGE_VALUE:
            store_rows(text_weights_ptr, BLOCK_T, first, pixel, is_pixel, word, every, weights)
    if SCORES:
        store_rows(grad_scores_ptr, BLOCK_T, first, pixel, is_pixel, word, every, grad_scores)


@triton.jit
def _apply_kernel(
    pixel_ptr,  # (B, P, h * width)
    word_ptr,  # (B, T, h * width)
    grad_image_ptr,  # (B, P, h * text_width): gradient of image_out
    grad_text_ptr,  # (B, T, h * image_width): gradient of text_out
    mask_ptr,  # (B, T) uint8, contiguous
    grad_scores_ptr,  # (B, h, P, BLOCK_T), contiguous: of `_weights_kernel`, as the next two
    image_weights_ptr,
    text_weights_ptr,
    grad_pixel_ptr,  # (B, P, h * width), contiguous, out
    grad_image_value_ptr,  # (B, P, h * image_width), contiguous, out
    word_sums_ptr,  # (B, h, runs, BLOCK_T, width) float32, contiguous, out: a run's part of the gradient of word
    text_value_sums_ptr,  # (B, h, runs, BLOCK_T, text_width) float32, contiguous, out: and of text_value
    pixel_batch,
    pixel_stride,
    word_batch,
    word_stride,
    grad_image_batch,
    grad_image_stride,
    grad_text_batch,
    grad_text_stride,
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
    WANT_PIXEL: tl.constexpr,
    WANT_WORD: tl.constexpr,
    WANT_TEXT_VALUE: tl.constexpr,
    WANT_IMAGE_VALUE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A run of pixels and a block of channels of a wide head: all gradients, of which those of the words in part."""
    index = tl.program_id(0).to(tl.int64)
    channel = (index % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = index // blocks % heads
    run = index // blocks // heads % runs
    image = index // blocks // heads // runs
    slot = image * heads + head
    first, last = run * run_pixels, tl.minimum((run + 1) * run_pixels, pixels)
    is_word = words_of(mask_ptr, image, words, HAS_MASK, BLOCK_T)
    pixel, word = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_T)
    every = word < BLOCK_T
    pixel_ptr += image * pixel_batch + head * width
    grad_image_ptr += image * grad_image_batch + head * text_width
    grad_pixel_ptr += image * pixels * heads * width + head * width
    grad_image_value_ptr += image * pixels * heads * image_width + head * image_width
    if WANT_PIXEL:
        word_ptr += image * word_batch + head * width
        word_rows = load_rows(word_ptr, word_stride, 0, word, is_word, channel, channel < width)
    if WANT_IMAGE_VALUE:
        grad_text_ptr += image * grad_text_batch + head * image_width
        grad_text = load_rows(grad_text_ptr, grad_text_stride, 0, word, is_word, channel, channel < image_width)
    grad_word = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    grad_text_value = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_P):
        is_pixel, at = pixel < last - start, slot * pixels + start
        if WANT_PIXEL or WANT_WORD:
            grads = load_rows(grad_scores_ptr, BLOCK_T, at, pixel, is_pixel, word, every)
        if WANT_PIXEL:
            out = dot(grads, word_rows, None, PRECISION) * scale
            store_rows(grad_pixel_ptr, heads * width, start, pixel, is_pixel, channel, channel < width, out)
        if WANT_WORD:
            read = load_rows(pixel_ptr, pixel_stride, start, pixel, is_pixel, channel, channel < width)
            grad_word = dot(tl.trans(grads), read, grad_word, PRECISION)
        if WANT_TEXT_VALUE:
            weights = load_rows(image_weights_ptr, BLOCK_T, at, pixel, is_pixel, word, every)
            read = load_rows(grad_image_ptr, grad_image_stride, start, pixel, is_pixel, channel, channel < text_width)
            grad_text_value = dot(tl.trans(weights), read, grad_text_value, PRECISION)
        if WANT_IMAGE_VALUE:
            weights = load_rows(text_weights_ptr, BLOCK_T, at, pixel, is_pixel, word, every)
            out = dot(weights, grad_text, None, PRECISION)
            is_channel = channel < image_width
            store_rows(grad_image_value_ptr, heads * image_width, start, pixel, is_pixel, channel, is_channel, out)
    if WANT_WORD:
        word_sums_ptr += (slot * runs + run) * BLOCK_T * width
        store_rows(word_sums_ptr, width, 0, word, is_word, channel, channel < width, grad_word)
    if WANT_TEXT_VALUE:
        text_value_sums_ptr += (slot * runs + run) * BLOCK_T * text_width
        store_rows(text_value_sums_ptr, text_width, 0, word, is_word, channel, channel < text_width, grad_text_value)


def product(
    similarity: Similarity, left: Tensor, right: Tensor, image_out: Tensor | None = None, *, store: bool = True
) -> Tensor | None:
    """left @ right^T of every head, (B, h, P, BLOCK_T) float32 (None unless `store`); and into `image_out` what the
    pixels read from text_value with it.

    Args:
        left: (B, P, h * width), right: (B, T, h * width).
    """
    this, (batch, pixels, channels) = similarity, left.shape
    products = this.scratch(batch, this.heads, pixels, this.block_t) if store else None

    def launch(config: triton.Config) -> None:
        tiles = triton.cdiv(pixels, config.kwargs["BLOCK_P"])
        _product_kernel[_runtime.grid(batch * this.heads * tiles)](
            **rows("left", left, left),
            **rows("right", right, left),
            **rows("value", this.text_value if image_out is not None else None, left),
            mask_ptr=this.mask_or_placeholder,
            products_ptr=left if products is None else products,
            image_out_ptr=left if image_out is None else image_out,
            tiles=tiles,
            width=channels // this.heads,
            value_width=this.widths[1],
            **this.sizes(),
            HAS_IMAGE=image_out is not None,
            STORE=store,
            BLOCK_D=this.block_d,
            **config.all_kwargs(),
        )

    _PRODUCT(launch, left.device, *this.key(2), channels, image_out is None, store)
    return products


class Products:
    """What the backward pass of a wide head keeps in memory: T numbers a pixel of each kind.

    Attributes:
        scores, image, text: (B, h, P, BLOCK_T) float32 products of pixel and word, of grad_image and text_value, and of
            image_value and grad_text; the latter two only for the gradient of the scores, and with their gradient.
    """

    def __init__(
        self, similarity: Similarity, grad_image: Tensor | None, grad_text: Tensor | None, grad_scores: bool
    ) -> None:
        self.similarity = this = similarity
        self.scores = product(this, this.pixel, this.word)
        self.image = self.text = self.scores
        if grad_scores and grad_image is not None:
            self.image = product(this, grad_image, this.text_value)
        if grad_scores and grad_text is not None:
            self.text = product(this, this.image_value, grad_text)

    def to_weights(
        self, statistics: dict[str, Tensor], has_image: bool, has_text: bool, wanted: Sequence[bool]
    ) -> None:
        """The products become weights and the gradient of the scores, in the dtype of the inputs.

        Args:
            statistics: pointers of the words' softmax; read with `has_text`.
            has_image, has_text: whether there are gradients of image_out and text_out.
            wanted: the gradients of pixel, word, text_value and image_value.
        """
        this, dtype, scores = self.similarity, self.similarity.pixel.dtype, wanted[0] or wanted[1]
        made = [torch.empty_like(self.scores, dtype=dtype) if want else None for want in (scores, *wanted[2:])]
        nothing = next(array for array in made if array is not None)
        self.weights = [nothing if array is None else array for array in made]
        tiles = triton.cdiv(this.pixel.shape[1], _WEIGHT_PIXELS)
        _weights_kernel[_runtime.grid(self.scores.shape[0] * this.heads * tiles)](
            products_ptr=self.scores,
            image_products_ptr=self.image,
            text_products_ptr=self.text,
            **statistics,
            **dict(zip(_WEIGHTS, self.weights, strict=True)),
            mask_ptr=this.mask_or_placeholder,
            runs=this.runs,
            tiles=tiles,
            **this.sizes(),
            HAS_IMAGE=has_image,
            HAS_TEXT=has_text,
            SCORES=scores,
            WANT_TEXT_VALUE=wanted[2],
            WANT_IMAGE_VALUE=wanted[3],
            BLOCK_P=_WEIGHT_PIXELS,
            BLOCK_R=_runtime.power_of_two(this.runs, 1),
        )
        del self.scores, self.image, self.text

    def apply(self, arguments: dict[str, object]) -> None:
        """The gradients, from the weights and the other arguments of `_apply_kernel`."""
        this = self.similarity

        def launch(config: triton.Config) -> None:
            _apply_kernel[_runtime.grid(this.pixel.shape[0] * this.heads * this.runs * this.blocks)](
                **arguments,
                **dict(zip(_WEIGHTS, self.weights, strict=True)),
                blocks=this.blocks,
                **config.all_kwargs(),
            )

        wanted = [value for name, value in arguments.items() if name.startswith("WANT")]
        _APPLY(launch, this.pixel.device, *this.key(3), *wanted)


_WEIGHTS = ("grad_scores_ptr", "image_weights_ptr", "text_weights_ptr")
_WEIGHT_PIXELS = 64

_PRODUCT = _runtime.Autotuner(product_walks, _product_kernel)
_APPLY = _runtime.Autotuner(apply_walks, _apply_kernel)
