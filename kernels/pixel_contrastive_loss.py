"""The pixel contrastive loss without its P * P similarities: log-sum-exps over tiles; the backward pass makes the tiles
again and keeps the sums.

With z the normalised features, s_ij = z_i . z_j / t, and a pixel's own side and the other one of the mask, the loss of
pixel i is softplus(lse_other(s_i) - lse_own(s_i)), and the gradient of s_ij is, but for the pixel's weight,
-sigmoid(...) * exp(s_ij - lse_own) on its own side and exp(s_ij - lse_all) on the other. s is symmetric, so the row of
pixel i holds all that its gradient needs: sum_j (G_ij + G_ji) z_j, and no two programs add to one number.

The products are those of the features as they are; the norms divide the sums. 16-bit features so go into the matrix
units without being rounded again, and the result is that of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._runtime import dot, precision, rounded
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# torch's normalize divides by this where a norm is smaller.
_LEAST_NORM = tl.constexpr(1e-6)


@triton.jit
def _load_features(ptr, pixel_stride, channel_stride, first, pixel, pixels, channel, channels):
    """Of the pixels first + pixel of one image, (pixels, channels); zeros beyond either. Offsets from the first pixel
    have 32 bits (`_within_reach`), which saves registers."""
    ptr += tl.cast(first, tl.int64) * pixel_stride
    offsets = pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    return tl.load(ptr + offsets, mask=(pixel < pixels - first)[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def _products(
    features_ptr,
    pixel_stride,
    channel_stride,
    first_row,
    first_column,
    pixels,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of the features of a tile of rows and one of columns over all channels, (BLOCK_M, BLOCK_N) float32."""
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        left = _load_features(features_ptr, pixel_stride, channel_stride, first_row, row, pixels, channel, channels)
        right = _load_features(
            features_ptr, pixel_stride, channel_stride, first_column, column, pixels, channel, channels
        )
        products = dot(left, tl.trans(right), products, PRECISION)
    return products


@triton.jit
def _norm_kernel(
    features_ptr,  # (B, P, C), any strides
    inverse_ptr,  # (B, P) float32, contiguous, out: 1 / norm
    batch_stride,
    pixel_stride,
    channel_stride,
    pixels,
    channels,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    image = index // blocks
    first, pixel = (index % blocks).to(tl.int32) * BLOCK_M, tl.arange(0, BLOCK_M)
    features_ptr += image * batch_stride
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        features = _load_features(features_ptr, pixel_stride, channel_stride, first, pixel, pixels, channel, channels)
        features = features.to(tl.float32)
        squares += tl.sum(features * features, 1)
    # Written so that NaN stays NaN.
    norm = tl.sqrt(squares)
    norm = tl.where(norm < _LEAST_NORM, _LEAST_NORM, norm)
    tl.store(inverse_ptr + image * pixels + first + pixel, 1.0 / norm, mask=pixel < pixels - first)


@triton.jit
def _forward_kernel(
    features_ptr,  # (B, P, C), any strides
    inverse_ptr,  # (B, P) float32, contiguous, if NORMALIZE
    inside_ptr,  # (B, P) uint8, contiguous
    count_ptr,  # (B,) int64, contiguous: pixels inside
    loss_ptr,  # (B, blocks) float32, contiguous, out: the block's part of the loss
    statistics_ptr,  # (4, B, P) float32, contiguous, out: see below
    batch_stride,
    pixel_stride,
    channel_stride,
    batch,
    pixels,
    channels,
    blocks,
    inverse_temperature,
    NORMALIZE: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of rows: their losses, and what the gradient of a row's similarities takes. That is
    factor * 2^(similarity - base), with (base, factor) of its own side and of the other one: four statistics."""
    index = tl.program_id(0).to(tl.int64)
    image, block = index // blocks, index % blocks
    first = block.to(tl.int32) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < pixels
    features_ptr += image * batch_stride
    inverse_ptr += image * pixels
    inside_ptr += image * pixels
    side = tl.load(inside_ptr + row, mask=is_row, other=0) != 0
    scale = tl.full([BLOCK_M], inverse_temperature * _LOG2_E, tl.float32)
    if NORMALIZE:
        scale *= tl.load(inverse_ptr + row, mask=is_row, other=0.0)
    tile_row, tile_column, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    if ONE:
        row_features = _load_features(
            features_ptr, pixel_stride, channel_stride, first, tile_row, pixels, channel, channels
        )

    own_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    other_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    own_total = tl.zeros([BLOCK_M], tl.float32)
    other_total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, pixels, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        is_column = column < pixels
        if ONE:
            features = _load_features(
                features_ptr, pixel_stride, channel_stride, start, tile_column, pixels, channel, channels
            )
            similarity = dot(row_features, tl.trans(features), None, PRECISION)
        else:
            similarity = _products(
                features_ptr,
                pixel_stride,
                channel_stride,
                first,
                start,
                pixels,
                channels,
                BLOCK_M,
                BLOCK_N,
                BLOCK_C,
                PRECISION,
            )
        similarity *= scale[:, None]
        if NORMALIZE:
            similarity *= tl.load(inverse_ptr + column, mask=is_column, other=0.0)[None, :]
        column_side = tl.load(inside_ptr + column, mask=is_column, other=0) != 0
        own = (side[:, None] == column_side[None, :]) & is_column[None, :]
        other = (side[:, None] != column_side[None, :]) & is_column[None, :]
        own_larger = tl.maximum(own_maximum, tl.max(tl.where(own, similarity, float("-inf")), 1))
        other_larger = tl.maximum(other_maximum, tl.max(tl.where(other, similarity, float("-inf")), 1))
        # A side may have no pixel so far: -inf - -inf would be NaN.
        own_base = tl.where(own_larger == float("-inf"), 0.0, own_larger)
        other_base = tl.where(other_larger == float("-inf"), 0.0, other_larger)
        power = tl.exp2(similarity - tl.where(own, own_base[:, None], other_base[:, None]))
        own_total = own_total * tl.exp2(own_maximum - own_base) + tl.sum(tl.where(own, power, 0.0), 1)
        other_total = other_total * tl.exp2(other_maximum - other_base) + tl.sum(tl.where(other, power, 0.0), 1)
        own_maximum, other_maximum = own_larger, other_larger

    count = tl.load(count_ptr + image).to(tl.float32)
    weight = 1.0 / tl.where(side, count, pixels - count)
    own_base = tl.where(own_maximum == float("-inf"), 0.0, own_maximum) + tl.log2(own_total)
    # Without any pixel on the other side this is -inf, and the loss 0.
    difference = other_maximum - own_base + tl.log2(other_total)
    difference = tl.where(other_maximum == float("-inf"), float("-inf"), difference)
    excess = tl.where(difference > 0.0, difference, 0.0)
    softplus = excess + tl.log2(1.0 + tl.exp2(-tl.abs(difference)))
    at, plane = statistics_ptr + image * pixels + row, batch.to(tl.int64) * pixels
    tl.store(at, own_base, mask=is_row)
    tl.store(at + plane, -weight / (1.0 + tl.exp2(-difference)), mask=is_row)
    tl.store(at + 2 * plane, own_base + softplus, mask=is_row)
    tl.store(at + 3 * plane, weight, mask=is_row)
    loss = tl.sum(tl.where(is_row, weight * softplus * _LN_2, 0.0), 0)
    tl.store(loss_ptr + index, loss)


@triton.jit
def _backward_kernel(
    features_ptr,  # (B, P, C), any strides
    inverse_ptr,  # (B, P) float32, contiguous, if NORMALIZE
    inside_ptr,  # (B, P) uint8, contiguous
    statistics_ptr,  # (4, B, P) float32, contiguous
    grad_loss_ptr,  # (B,) float32, contiguous
    grad_ptr,  # (B, P, C), contiguous, out
    batch_stride,
    pixel_stride,
    channel_stride,
    batch,
    pixels,
    channels,
    blocks,
    channel_blocks,
    inverse_temperature,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,  # channels of the gradient
    PRECISION: tl.constexpr,
):
    """A block of rows and of channels of the gradient."""
    index = tl.program_id(0).to(tl.int64)
    first_channel = (index % channel_blocks).to(tl.int32) * BLOCK_G
    block = index // channel_blocks % blocks
    image = index // channel_blocks // blocks
    first = block.to(tl.int32) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < pixels
    features_ptr += image * batch_stride
    inverse_ptr += image * pixels
    inside_ptr += image * pixels
    statistics_ptr += image * pixels
    plane = batch.to(tl.int64) * pixels
    side = tl.load(inside_ptr + row, mask=is_row, other=0) != 0
    own_base = tl.load(statistics_ptr + row, mask=is_row, other=0.0)
    own_factor = tl.load(statistics_ptr + plane + row, mask=is_row, other=0.0)
    other_base = tl.load(statistics_ptr + 2 * plane + row, mask=is_row, other=0.0)
    other_factor = tl.load(statistics_ptr + 3 * plane + row, mask=is_row, other=0.0)
    inverse = tl.full([BLOCK_M], 1.0, tl.float32)
    if NORMALIZE:
        inverse = tl.load(inverse_ptr + row, mask=is_row, other=0.0)
    tile_row, tile_column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    channel = first_channel + tl.arange(0, BLOCK_G)

    grad = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)  # the gradient of z_i times z_i
    for start in range(0, pixels, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        is_column = column < pixels
        cosine = _products(
            features_ptr,
            pixel_stride,
            channel_stride,
            first,
            start,
            pixels,
            channels,
            BLOCK_M,
            BLOCK_N,
            BLOCK_C,
            PRECISION,
        )
        column_inverse = tl.where(is_column, 1.0, 0.0)
        if NORMALIZE:
            column_inverse = tl.load(inverse_ptr + column, mask=is_column, other=0.0)
        cosine *= inverse[:, None] * column_inverse[None, :]
        similarity = cosine * (inverse_temperature * _LOG2_E)
        column_side = tl.load(inside_ptr + column, mask=is_column, other=0) != 0
        own = side[:, None] == column_side[None, :]
        base = tl.where(own, own_base[:, None], other_base[:, None])
        grad_similarity = tl.where(own, own_factor[:, None], other_factor[:, None]) * tl.exp2(similarity - base)
        column_own = tl.load(statistics_ptr + column, mask=is_column, other=0.0)
        column_other = tl.load(statistics_ptr + 2 * plane + column, mask=is_column, other=0.0)
        base = tl.where(own, column_own[None, :], column_other[None, :])
        column_own = tl.load(statistics_ptr + plane + column, mask=is_column, other=0.0)
        column_other = tl.load(statistics_ptr + 3 * plane + column, mask=is_column, other=0.0)
        factor = tl.where(own, column_own[None, :], column_other[None, :])
        grad_similarity += factor * tl.exp2(similarity - base)
        grad_similarity = tl.where(is_column[None, :], grad_similarity, 0.0)
        along += tl.sum(grad_similarity * cosine, 1)
        grad_similarity *= column_inverse[None, :]
        features = _load_features(
            features_ptr, pixel_stride, channel_stride, start, tile_column, pixels, channel, channels
        )
        if features.dtype == tl.bfloat16:
            # Rounded once the factors would have 8 bits; in two pieces they have 16.
            upper = rounded(grad_similarity, tl.bfloat16)
            grad = dot(upper, features, grad, PRECISION)
            lower = rounded(grad_similarity - upper.to(tl.float32), tl.bfloat16)
            grad = dot(lower, features, grad, PRECISION)
        else:
            # Factors of about 1 / P^2 are too small for float16.
            grad = dot(grad_similarity, features.to(tl.float32), grad, PRECISION)

    if NORMALIZE:
        features = _load_features(
            features_ptr, pixel_stride, channel_stride, first, tile_row, pixels, channel, channels
        )
        # A norm below the least is taken for a constant.
        along = tl.where(inverse < 1.0 / _LEAST_NORM, along * inverse, 0.0)
        grad = (grad - along[:, None] * features.to(tl.float32)) * inverse[:, None]
    grad_ptr += image * pixels * channels
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    grad *= inverse_temperature * tl.load(grad_loss_ptr + image)
    grad = rounded(grad, grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + at, grad, mask=is_row[:, None] & (channel < channels)[None, :])


def forward(features: Tensor, inside: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """(B,) float32 losses of features (B, P, C), any strides, and inside (B, P) uint8, contiguous; and `statistics`."""
    features = _within_reach(features)
    (batch, pixels, channels), device = features.shape, features.device
    kept = statistics(features)
    inverse = kept[4]
    if normalize:
        blocks = triton.cdiv(pixels, _NORM_PIXELS)
        _norm_kernel[_runtime.grid(batch * blocks)](
            features_ptr=features,
            inverse_ptr=inverse,
            batch_stride=features.stride(0),
            pixel_stride=features.stride(1),
            channel_stride=features.stride(2),
            pixels=pixels,
            channels=channels,
            blocks=blocks,
            BLOCK_M=_NORM_PIXELS,
            BLOCK_C=min(_runtime.power_of_two(channels), 64),
        )
    count = inside.sum(1, dtype=torch.int64)

    def launch(config: triton.Config) -> Tensor:
        blocks = triton.cdiv(pixels, config.kwargs["BLOCK_M"])
        loss = torch.empty(batch, blocks, dtype=torch.float32, device=device)
        _forward_kernel[_runtime.grid(batch * blocks)](
            **_inputs(features, inside, inverse, temperature),
            count_ptr=count,
            loss_ptr=loss,
            statistics_ptr=kept,
            blocks=blocks,
            NORMALIZE=normalize,
            **_channels(features),
            **config.all_kwargs(),
        )
        return loss

    loss = _FORWARD(launch, device, *_key(features), normalize)
    return loss.sum(1), kept


def statistics(features: Tensor) -> Tensor:
    """(5, B, P) float32, uninitialised: `_forward_kernel`'s four statistics of each pixel, and 1 / norm."""
    batch, pixels, _ = features.shape
    return features.new_empty((5, batch, pixels), dtype=torch.float32)


def backward(
    grad_loss: Tensor, features: Tensor, inside: Tensor, kept: Tensor, temperature: float, normalize: bool
) -> Tensor:
    """The gradient of features, (B, P, C), contiguous, for that of the losses, (B,) float32, contiguous; `kept` are the
    statistics that the forward pass returned."""
    features = _within_reach(features)
    (batch, pixels, channels), device = features.shape, features.device
    grad = torch.empty_like(features, memory_format=torch.contiguous_format)
    block_g = min(_runtime.power_of_two(channels), _GRADIENT_CHANNELS)

    def launch(config: triton.Config) -> None:
        blocks = triton.cdiv(pixels, config.kwargs["BLOCK_M"])
        channel_blocks = triton.cdiv(channels, block_g)
        _backward_kernel[_runtime.grid(batch * blocks * channel_blocks)](
            **_inputs(features, inside, kept[4], temperature),
            statistics_ptr=kept,
            grad_loss_ptr=grad_loss,
            grad_ptr=grad,
            blocks=blocks,
            channel_blocks=channel_blocks,
            NORMALIZE=normalize,
            BLOCK_C=min(_runtime.power_of_two(channels), _STEP_BYTES // features.element_size()),
            BLOCK_G=block_g,
            **config.all_kwargs(),
        )

    _BACKWARD(launch, device, *_key(features), normalize)
    return grad


def _within_reach(features: Tensor) -> Tensor:
    """The features, copied where a tile of them would reach over 2^31 numbers."""
    _, _, channels = features.shape
    reach = _LARGEST_TILE * features.stride(1) + channels * features.stride(2)
    return features if reach < 2**31 else features.contiguous()


def _inputs(
    features: Tensor, inside: Tensor, inverse: Tensor, temperature: float
) -> dict[str, Tensor | int | float | str]:
    batch, pixels, channels = features.shape
    return {
        "features_ptr": features,
        "inverse_ptr": inverse,
        "inside_ptr": inside,
        "batch_stride": features.stride(0),
        "pixel_stride": features.stride(1),
        "channel_stride": features.stride(2),
        "batch": batch,
        "pixels": pixels,
        "channels": channels,
        "inverse_temperature": 1.0 / temperature,
        "PRECISION": precision(features.dtype),
    }


def _channels(features: Tensor) -> dict[str, int | bool]:
    """How a row of channels is cut: whole where a few such tiles fit on chip."""
    whole = _runtime.power_of_two(features.shape[2])
    one = whole * features.element_size() <= _WHOLE_BYTES[features.element_size()]
    return {"ONE": one, "BLOCK_C": whole if one else _STEP_BYTES // features.element_size()}


def _key(features: Tensor) -> tuple[object, ...]:
    pixels = min(_runtime.power_of_two(features.shape[1]), _MOST_PIXELS)
    return (features.dtype, pixels, features.shape[2], features.stride(2) == 1, precision(features.dtype))


def _tiles(dtype: torch.dtype, pixels: int, *_: object) -> list[triton.Config]:
    sizes = [(64, 32, 4, 2), (32, 32, 4, 2)]
    # float32 takes three pieces of each operand: too many registers for the larger tiles.
    if dtype != torch.float32:
        sizes = [(128, 64, 8, 2), (64, 64, 4, 2), *sizes]
    return _fitting(sizes, pixels)


def _backward_tiles(dtype: torch.dtype, pixels: int, channels: int, *_: object) -> list[triton.Config]:
    sizes = [(64, 32, 8, 2), (32, 32, 8, 2)] if channels > 64 else [(32, 32, 8, 2)]
    # float16's factors are float32, too.
    return _fitting([(64, 64, 8, 2), *sizes] if dtype == torch.bfloat16 else sizes, pixels)


def _fitting(sizes: list[tuple[int, int, int, int]], pixels: int) -> list[triton.Config]:
    """Of (rows, columns, warps, stages)."""
    found = [
        triton.Config({"BLOCK_M": rows, "BLOCK_N": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in sizes
        if rows <= pixels
    ]
    return found[:_MOST_CANDIDATES] or [triton.Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2)]


_NORM_PIXELS, _LARGEST_TILE = 64, 128
# Bytes of a pixel's channels up to which the forward pass holds them all, by bytes of one, and of a step where it does
# not; channels of the gradient that one program makes.
_WHOLE_BYTES, _STEP_BYTES, _GRADIENT_CHANNELS = {2: 512, 4: 128}, 128, 128
# Maps beyond this many pixels choose as this one.
_MOST_PIXELS = 4096
# Each is compiled, and timed at the first call.
_MOST_CANDIDATES = 2

_FORWARD = _runtime.Autotuner(_tiles, _forward_kernel)
_BACKWARD = _runtime.Autotuner(_backward_tiles, _backward_kernel)


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that `report` compiles: channels first and last, few and many, on meta tensors."""
    sizes = [(256, True, 14400), (256, False, 14400), (512, True, 14400), (64, True, 60)]
    for channels, first, pixels in sizes[:1] if quick else sizes:
        shape = (2, channels, pixels) if first else (2, pixels, channels)
        features = torch.empty(shape, dtype=dtype, device="meta")
        features = features.transpose(1, 2) if first else features
        inside = torch.empty(2, pixels, dtype=torch.uint8, device="meta")
        grad_loss = torch.empty(2, dtype=torch.float32, device="meta")
        label = f"P {pixels}, C {channels}, channels {'first' if first else 'last'}"
        yield label, functools.partial(forward, features, inside, 0.1, True)
        yield label, functools.partial(backward, grad_loss, features, inside, statistics(features), 0.1, True)
