"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159, section 4.1): every query reads K points on each of L
maps, bilinearly, and sums them with its weights. The fused form (FUSED) takes the softmax of the weights' logits and
the location arithmetic into the same kernels.

A program takes some queries of one head with all their points side by side. No output of these kernels is added to by
two programs; the gradient of `value` is, and has kernels of its own in `_deformable_value`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._deformable_launch import Points, gathers, gathers_backward
from magnet_fast.kernels._deformable_points import corners_of, maps_of, places_of, weights_of
from magnet_fast.kernels._deformable_value import gradient_of_value
from magnet_fast.kernels._runtime import rounded
from torch import Tensor


@triton.jit
def _forward_kernel(
    value_ptr,  # (B, S, h, d)
    places_ptr,  # (B, Q, h, L, K, 2): sampling_locations, or sampling_offsets if FUSED; (L, K, 2) contiguous
    weights_ptr,  # (B, Q, h, L, K): attention_weights, or attention_logits if FUSED; (L, K) contiguous
    reference_ptr,  # (B, Q, L, 2 or 4) if FUSED, the last dimension contiguous; strides may be 0
    out_ptr,  # (B, Q, h * d), contiguous, out
    value_batch,
    value_stride,
    value_head,
    places_batch,
    places_stride,
    places_head,
    weights_batch,
    weights_stride,
    weights_head,
    reference_batch,
    reference_query,
    reference_level,
    queries,
    heads,
    blocks,  # of BLOCK_Q queries
    width,  # channels of one head
    maps,  # (H, W) of every level, one after the other
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least L * K
    BLOCK_D: tl.constexpr,
):
    TOTAL: tl.constexpr = LEVELS * POINTS
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    first = index // heads % blocks * BLOCK_Q
    image = index // heads // blocks
    query = first + tl.arange(0, BLOCK_Q)
    is_query = query < queries
    lines, columns, start = maps_of(maps, LEVELS, POINTS, BLOCK_P)
    weights_ptr += image * weights_batch + head * weights_head
    places_ptr += image * places_batch + head * places_head
    reference_ptr += image * reference_batch
    value_ptr += image * value_batch + head * value_head
    out_ptr += image * queries * heads * width + head * width

    weights = weights_of(weights_ptr, weights_stride, query, is_query, TOTAL, FUSED, BLOCK_P)
    x, y, _, _, _, _ = places_of(
        places_ptr,
        reference_ptr,
        places_stride,
        reference_query,
        reference_level,
        query,
        is_query,
        lines,
        columns,
        TOTAL,
        POINTS,
        FUSED,
        BOXES,
        BLOCK_P,
    )
    column, line, right, low, touches = corners_of(x, y, lines, columns)
    position = (start[None, :] + line * columns[None, :] + column).to(tl.int64)
    for block in range(0, width, BLOCK_D):
        channel = block + tl.arange(0, BLOCK_D)
        sums = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_D], tl.float32)
        for corner in tl.static_range(4):
            dx, dy = corner % 2, corner // 2
            share = (right if dx else 1.0 - right) * (low if dy else 1.0 - low) * weights
            on_map = touches & (column + dx >= 0) & (column + dx < columns[None, :])
            on_map = on_map & (line + dy >= 0) & (line + dy < lines[None, :])
            offsets = (position + dy * columns[None, :] + dx) * value_stride
            read = tl.load(
                value_ptr + offsets[:, :, None] + channel[None, None, :],
                mask=on_map[:, :, None] & (channel < width)[None, None, :],
                other=0.0,
            )
            # What is off the map counts nothing, whatever the weight: 0 * inf would be NaN.
            sums += tl.where(on_map, share, 0.0)[:, :, None] * read.to(tl.float32)
        offsets = query[:, None] * (heads * width) + channel[None, :]
        mask = is_query[:, None] & (channel < width)[None, :]
        tl.store(out_ptr + offsets, rounded(tl.sum(sums, 1), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    value_ptr,  # (B, S, h, d)
    places_ptr,  # (B, Q, h, L, K, 2)
    weights_ptr,  # (B, Q, h, L, K)
    reference_ptr,  # (B, Q, L, 2 or 4)
    grad_out_ptr,  # (B, Q, h * d), contiguous
    grad_places_ptr,  # (B, Q, h, L, K, 2), contiguous, out
    grad_weights_ptr,  # (B, Q, h, L, K), contiguous, out
    grad_boxes_ptr,  # (B, Q, h, L * K, 4) float32, contiguous, out: (x, y, width, height) of each point's reference
    value_batch,
    value_stride,
    value_head,
    places_batch,
    places_stride,
    places_head,
    weights_batch,
    weights_stride,
    weights_head,
    reference_batch,
    reference_query,
    reference_level,
    queries,
    heads,
    blocks,
    width,
    maps,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    BOXES: tl.constexpr,
    WANT_PLACES: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    WANT_REFERENCE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the points: each is that of its own head, level and query, but for those of the reference points,
    which the host adds up over heads and points."""
    TOTAL: tl.constexpr = LEVELS * POINTS
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    first = index // heads % blocks * BLOCK_Q
    image = index // heads // blocks
    query = first + tl.arange(0, BLOCK_Q)
    is_query = query < queries
    lines, columns, start = maps_of(maps, LEVELS, POINTS, BLOCK_P)
    weights_ptr += image * weights_batch + head * weights_head
    places_ptr += image * places_batch + head * places_head
    reference_ptr += image * reference_batch
    value_ptr += image * value_batch + head * value_head
    grad_out_ptr += image * queries * heads * width + head * width

    weights = weights_of(weights_ptr, weights_stride, query, is_query, TOTAL, FUSED, BLOCK_P)
    x, y, unit_x, unit_y, offset_x, offset_y = places_of(
        places_ptr,
        reference_ptr,
        places_stride,
        reference_query,
        reference_level,
        query,
        is_query,
        lines,
        columns,
        TOTAL,
        POINTS,
        FUSED,
        BOXES,
        BLOCK_P,
    )
    column, line, right, low, touches = corners_of(x, y, lines, columns)
    position = (start[None, :] + line * columns[None, :] + column).to(tl.int64)
    grad_weights = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
    grad_x = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
    grad_y = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
    for block in range(0, width, BLOCK_D):
        channel = block + tl.arange(0, BLOCK_D)
        offsets = query[:, None] * (heads * width) + channel[None, :]
        mask = is_query[:, None] & (channel < width)[None, :]
        grad_out = tl.load(grad_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        for corner in tl.static_range(4):
            dx, dy = corner % 2, corner // 2
            across, down = right if dx else 1.0 - right, low if dy else 1.0 - low
            on_map = touches & (column + dx >= 0) & (column + dx < columns[None, :])
            on_map = on_map & (line + dy >= 0) & (line + dy < lines[None, :])
            offsets = (position + dy * columns[None, :] + dx) * value_stride
            read = tl.load(
                value_ptr + offsets[:, :, None] + channel[None, None, :],
                mask=on_map[:, :, None] & (channel < width)[None, None, :],
                other=0.0,
            )
            product = tl.sum(read.to(tl.float32) * grad_out[:, None, :], 2)
            product = tl.where(on_map, product, 0.0)
            grad_weights += across * down * product
            grad_x += (down if dx else -down) * product
            grad_y += (across if dy else -across) * product
    grad_x, grad_y = grad_x * weights, grad_y * weights

    point = tl.arange(0, BLOCK_P)
    exists = is_query[:, None] & (point < TOTAL)[None, :]
    at = ((image * queries + query) * heads + head)[:, None] * TOTAL + point[None, :]
    if WANT_WEIGHTS:
        if FUSED:
            grad_weights = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
        tl.store(grad_weights_ptr + at, rounded(grad_weights, grad_weights_ptr.dtype.element_ty), mask=exists)
    if WANT_PLACES:
        element = grad_places_ptr.dtype.element_ty
        tl.store(grad_places_ptr + 2 * at, rounded(grad_x * unit_x, element), mask=exists)
        tl.store(grad_places_ptr + 2 * at + 1, rounded(grad_y * unit_y, element), mask=exists)
    if WANT_REFERENCE:
        grad_x, grad_y = grad_x * columns[None, :].to(tl.float32), grad_y * lines[None, :].to(tl.float32)
        tl.store(grad_boxes_ptr + 4 * at, grad_x, mask=exists)
        tl.store(grad_boxes_ptr + 4 * at + 1, grad_y, mask=exists)
        if BOXES:
            tl.store(grad_boxes_ptr + 4 * at + 2, grad_x * offset_x * (0.5 / POINTS), mask=exists)
            tl.store(grad_boxes_ptr + 4 * at + 3, grad_y * offset_y * (0.5 / POINTS), mask=exists)


def forward(points: Points) -> Tensor:
    """(B, Q, h * d), dtype of value."""
    batch, queries, heads = points.counts
    out = points.value.new_empty(batch, queries, heads * points.width)

    def launch(config: triton.Config) -> None:
        blocks = triton.cdiv(queries, config.kwargs["BLOCK_Q"])
        _forward_kernel[_runtime.grid(batch * heads * blocks)](
            **points.value_arguments(),
            **points.point_arguments(),
            out_ptr=out,
            blocks=blocks,
            **config.all_kwargs(),
        )

    _FORWARD(launch, out.device, *points.key())
    return out


def backward(
    grad_out: Tensor, points: Points, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, places, weights and the reference, None for those not wanted.

    Args:
        grad_out: (B, Q, h * d), contiguous.
        wanted: which of the four.

    Returns:
        those of places and weights in their dtypes; that of the reference (B, Q, L, 2 or 4), float32.
    """
    want_value, want_places, want_weights, want_reference = wanted
    grad_value = gradient_of_value(grad_out, points) if want_value else None
    if not (want_places or want_weights or want_reference):
        return grad_value, None, None, None
    (batch, queries, heads), contiguous = points.counts, torch.contiguous_format
    grad_places = torch.empty_like(points.places, memory_format=contiguous) if want_places else None
    grad_weights = torch.empty_like(points.weights, memory_format=contiguous) if want_weights else None
    boxes = None
    if want_reference:
        shape = (batch, queries, heads, points.total, 4)
        boxes = torch.empty(shape, dtype=torch.float32, device=grad_out.device)

    def launch(config: triton.Config) -> None:
        blocks = triton.cdiv(queries, config.kwargs["BLOCK_Q"])
        _backward_kernel[_runtime.grid(batch * heads * blocks)](
            **points.value_arguments(),
            **points.point_arguments(),
            grad_out_ptr=grad_out,
            grad_places_ptr=points.places if grad_places is None else grad_places,
            grad_weights_ptr=points.weights if grad_weights is None else grad_weights,
            grad_boxes_ptr=grad_out if boxes is None else boxes,
            blocks=blocks,
            WANT_PLACES=want_places,
            WANT_WEIGHTS=want_weights,
            WANT_REFERENCE=want_reference,
            **config.all_kwargs(),
        )

    _BACKWARD(launch, grad_out.device, *points.key(), *wanted[1:])
    if boxes is not None:
        coordinates = points.reference.shape[3]
        boxes = boxes.unflatten(3, points.places.shape[3:5])[..., :coordinates].sum((2, 4))  # (B, Q, L, 2 or 4)
    return grad_value, grad_places, grad_weights, boxes


_FORWARD = _runtime.Autotuner(gathers, _forward_kernel)
_BACKWARD = _runtime.Autotuner(gathers_backward, _backward_kernel)


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that `report` compiles: pyramids of three and four maps, all forms, on meta tensors."""
    pyramids = [("fused", [60, 60, 30, 30, 15, 15], 32, 2)]
    if not quick:
        pyramids += [
            ("plain", [60, 60, 30, 30, 15, 15], 32, 0),
            ("boxes", [60, 60, 30, 30, 15, 15], 32, 4),
            ("fused", [120, 120, 60, 60, 30, 30, 15, 15], 32, 2),
            ("fused", [60, 60, 30, 30, 15, 15], 64, 2),
        ]
    for form, sizes, d, coordinates in pyramids:
        levels, count = len(sizes) // 2, sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))

        def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(2, *shape, dtype=dtype, device="meta")

        reference = tensor(count, levels, coordinates) if coordinates else None
        value, weights = tensor(count, 8, d, dtype=dtype), tensor(count, 8, levels, 4, dtype=dtype)
        points = Points(value, tensor(count, 8, levels, 4, 2), weights, reference, sizes)
        label = f"{form}, {levels} levels, d {d}"
        yield label, functools.partial(forward, points)
        wanted = (True, True, True, form == "boxes")
        yield label, functools.partial(backward, tensor(count, 8 * d, dtype=dtype), points, wanted)
