"""Deformable attention's C++ kernels, of both forms; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import view

# A call packs all of `value` first. On maps of 120² to 15² (S = 19,125, 16 points a query) the reference was faster
# with 20 queries and slower with 300. The line is drawn at about 60, between them: 4 * 16 * 60 rows are a fifth of S.
_READ_PER_ROW = 5


def forward(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Arguments as the reference's; any strides."""
    return _forward(value, *_located(value, sampling_locations, attention_weights), sizes)


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
        return [_zeros(tensor) if want else None for tensor, want in zip(given, wanted, strict=True)]
    points = _located(value, sampling_locations, attention_weights)
    return _in_dtypes_of(_backward(grad_out, value, *points, sizes, (*wanted, False))[:3], given)


def fused_forward(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """Arguments as the fused operator's reference; any strides."""
    return _forward(value, *_raw(value, reference_points, sampling_offsets, attention_logits), sizes)


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
        return [_zeros(tensor) if want else None for tensor, want in zip(given, wanted, strict=True)]
    points = _raw(value, reference_points, sampling_offsets, attention_logits)
    want_value, want_reference, want_offsets, want_logits = wanted
    grad_value, grad_offsets, grad_logits, grad_reference = _backward(
        grad_out, value, *points, sizes, (want_value, want_offsets, want_logits, want_reference)
    )
    if grad_reference is not None:
        grad_reference = grad_reference.view(reference_points.shape)
    return _in_dtypes_of([grad_value, grad_reference, grad_offsets, grad_logits], given)


def passed_over(*arguments: object) -> str | None:
    """Why `auto` leaves a call to the reference: float64, or few queries on large maps."""
    value, points = arguments[0], next(a for a in arguments if isinstance(a, Tensor) and a.dim() == 6)
    corners = 4 * points.shape[1] * points.shape[3] * points.shape[4]
    if corners * _READ_PER_ROW < value.shape[1]:
        return f"{points.shape[1]} queries read so little of {value.shape[1]} positions that packing them does not pay"
    return _cpu_backend.passed_over(*arguments)


def _channels_together(value: Tensor) -> Tensor:
    """The kernel reads `value` with any strides but the last."""
    return value if value.stride(3) == 1 else value.contiguous()


def _located(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, None]:
    """Locations, weights, and no reference points.

    The kernel reads both contiguously, and places points in the dtype that it computes in.
    """
    return locations.to(_cpu_backend.computed(value)).contiguous(), weights.contiguous(), None


def four_dimensions(reference: Tensor) -> Tensor:
    """(Q, c), (B, Q, c) or (B, Q, L, c) as (1 or B, Q, 1 or L, c)."""
    reference = reference if reference.dim() > 2 else reference.unsqueeze(0)
    return reference if reference.dim() > 3 else reference.unsqueeze(2)


def _raw(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, logits and reference points (1 or B, Q, 1 or L, 2 or 4).

    The kernel reads (L, K) of one head contiguously; offsets and logits are of one dtype, value's or float32.
    """
    if offsets.dtype != logits.dtype:
        offsets, logits = offsets.to(_cpu_backend.computed(value)), logits.to(_cpu_backend.computed(value))
    if offsets.stride()[3:] != (2 * offsets.shape[4], 2, 1):
        offsets = offsets.contiguous()
    if logits.stride()[3:] != (logits.shape[4], 1):
        logits = logits.contiguous()
    return offsets, logits, four_dimensions(reference.to(_cpu_backend.computed(value)).contiguous())


def _forward(value: Tensor, places: Tensor, weights: Tensor, reference: Tensor | None, sizes: Sequence[int]) -> Tensor:
    out = value.new_empty((value.shape[0], places.shape[1], value.shape[2] * value.shape[3]))
    value = _channels_together(value)
    _cpu_backend.extension.deformable_attention_forward(
        out=view(out), threads=torch.get_num_threads(), **inputs(value, places, weights, reference, sizes)
    )
    return out


def _backward(
    grad_out: Tensor,
    value: Tensor,
    places: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    sizes: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of value, places, weights and the reference points, in the dtypes and shapes that came here."""
    value, grad_out = _channels_together(value), grad_out.contiguous()
    given = (value, places, weights, reference)
    grads = [_empty(tensor) if want else None for tensor, want in zip(given, wanted, strict=True)]
    _cpu_backend.extension.deformable_attention_backward(
        grad_out=view(grad_out), threads=torch.get_num_threads(), **gradients(grads), **inputs(*given, sizes)
    )
    return grads


def inputs(
    value: Tensor, places: Tensor, weights: Tensor, reference: Tensor | None, sizes: Sequence[int]
) -> dict[str, object]:
    """What the extensions take in both passes of both forms."""
    return {
        "value": view(value),
        "places": view(places),
        "weights": view(weights),
        "reference": view(reference),
        "spatial_shapes": list(zip(sizes[::2], sizes[1::2], strict=True)),
    }


def gradients(grads: Sequence[Tensor | None]) -> dict[str, object]:
    """The gradients of value, places, weights and the reference points, for the extensions to write."""
    names = ("grad_value", "grad_places", "grad_weights", "grad_reference")
    return {name: view(grad) for name, grad in zip(names, grads, strict=True)}


def _empty(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)


def _in_dtypes_of(grads: Sequence[Tensor | None], given: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]
