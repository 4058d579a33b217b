"""Deformable attention's Triton kernels, of both forms; see `_triton_backend` for what they need.

The kernels are imported when they first run: Triton takes long to import.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _triton_backend

MOST_POINTS = 128


def supports(*arguments: object) -> str | None:
    """None when the kernels can run the call, else the reason why not."""
    points = next(a for a in arguments if isinstance(a, Tensor) and a.dim() == 6)
    _, queries, _, levels, count, _ = points.shape
    if levels * count > MOST_POINTS:
        return f"{levels * count} points of a query are not supported, {MOST_POINTS} at most"
    if queries * levels * count >= 2**31:
        return f"{queries} queries of {levels * count} points are not supported, 2^31 points at most"
    return _triton_backend.supports(*arguments)


def forward(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Arguments as the reference's; any strides."""
    return _forward(value, sampling_locations, attention_weights, None, sizes)


def backward(
    grad_out: Tensor | None,
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    sizes: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the three tensors, None for those not wanted."""
    given = (value, sampling_locations, attention_weights)
    if grad_out is None:
        return _zeros(given, wanted)
    return list(_backward(grad_out, *given, None, sizes, (*wanted, False))[:3])


def fused_forward(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """Arguments as the fused operator's reference; any strides."""
    return _forward(value, sampling_offsets, attention_logits, reference_points, sizes)


def fused_backward(
    grad_out: Tensor | None,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sizes: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the four tensors, None for those not wanted."""
    given = (value, reference_points, sampling_offsets, attention_logits)
    if grad_out is None:
        return _zeros(given, wanted)
    want_value, want_reference, *want = wanted
    wants = (want_value, *want, want_reference)
    value, offsets, logits, reference = _backward(
        grad_out, value, sampling_offsets, attention_logits, reference_points, sizes, wants
    )
    if reference is not None:
        # A dimension that was broadcast gets the sum.
        if reference_points.dim() < 4:
            reference = reference.sum(2)
        if reference_points.dim() < 3:
            reference = reference.sum(0)
        reference = reference.to(reference_points.dtype)
    return [value, reference, offsets, logits]


def _forward(value: Tensor, places: Tensor, weights: Tensor, reference: Tensor | None, sizes: Sequence[int]) -> Tensor:
    from magnet_fast.kernels import _runtime, deformable_attention

    with _runtime.on_device(value):
        return deformable_attention.forward(_points(value, places, weights, reference, sizes))


def _backward(
    grad_out: Tensor,
    value: Tensor,
    places: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    sizes: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    from magnet_fast.kernels import _runtime, deformable_attention

    with _runtime.on_device(value):
        points = _points(value, places, weights, reference, sizes)
        return deformable_attention.backward(grad_out.contiguous(), points, wanted)


def _points(value: Tensor, places: Tensor, weights: Tensor, reference: Tensor | None, sizes: Sequence[int]) -> object:
    """What the kernels take: the channels of a head, and the points of a query and head, stand together."""
    from magnet_fast.kernels._deformable_launch import Points

    _, queries, _, levels, count, _ = places.shape
    if value.stride(3) != 1:
        value = value.contiguous()
    if places.stride()[3:] != (2 * count, 2, 1):
        places = places.contiguous()
    if weights.stride()[3:] != (count, 1):
        weights = weights.contiguous()
    if reference is not None:
        coordinates = reference.shape[-1]
        reference = reference.contiguous()
        if reference.dim() < 4:
            reference = reference.unsqueeze(-2)
        reference = reference.expand(value.shape[0], queries, levels, coordinates)
    return Points(value, places, weights, reference, sizes)


def _zeros(given: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    contiguous = torch.contiguous_format
    return [
        torch.zeros_like(tensor, memory_format=contiguous) if want else None
        for tensor, want in zip(given, wanted, strict=True)
    ]
