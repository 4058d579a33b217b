"""Deformable attention's C++ kernels, of both forms; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend

# A call packs all of `value` first. On maps of 120² to 15² (S = 19,125, 16 points a query) the reference was faster
# with 20 queries and slower with 300. The line is drawn at about 60, between them: 4 * 16 * 60 rows are a fifth of S.
_READ_PER_ROW = 5


def forward(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Arguments as the reference's; any strides."""
    out = value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))
    value, points = _channels_together(value), _located(value, sampling_locations, attention_weights)
    _cpu_backend.extension.deformable_attention_forward(
        out_ptr=out.data_ptr(),
        locations_ptr=points[0].data_ptr(),
        weights_ptr=points[1].data_ptr(),
        **_sizes(value, points[0], sizes),
    )
    return out


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
    value, points = _channels_together(value), _located(value, sampling_locations, attention_weights)
    grads = [_empty(tensor) if want else None for tensor, want in zip((value, *points), wanted, strict=True)]
    grad_out = grad_out.contiguous()
    _cpu_backend.extension.deformable_attention_backward(
        grad_out_ptr=grad_out.data_ptr(),
        locations_ptr=points[0].data_ptr(),
        weights_ptr=points[1].data_ptr(),
        grad_value_ptr=_address(grads[0]),
        grad_locations_ptr=_address(grads[1]),
        grad_weights_ptr=_address(grads[2]),
        **_sizes(value, points[0], sizes),
    )
    return _in_dtypes_of(grads, given)


def fused_forward(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """Arguments as the fused operator's reference; any strides."""
    out = value.new_empty((value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3]))
    value, points = _channels_together(value), _raw(value, reference_points, sampling_offsets, attention_logits)
    _cpu_backend.extension.fused_deformable_attention_forward(
        out_ptr=out.data_ptr(), **_addresses(value, *points), **_sizes(value, points[1], sizes)
    )
    return out


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
    value, points = _channels_together(value), _raw(value, reference_points, sampling_offsets, attention_logits)
    grads = [_empty(tensor) if want else None for tensor, want in zip((value, *points), wanted, strict=True)]
    grad_out = grad_out.contiguous()
    _cpu_backend.extension.fused_deformable_attention_backward(
        grad_out_ptr=grad_out.data_ptr(),
        grad_value_ptr=_address(grads[0]),
        grad_reference_ptr=_address(grads[1]),
        grad_offsets_ptr=_address(grads[2]),
        grad_logits_ptr=_address(grads[3]),
        **_addresses(value, *points),
        **_sizes(value, points[1], sizes),
    )
    return _in_dtypes_of(grads, given)


def passed_over(*arguments: object) -> str | None:
    """Why `auto` leaves a call to the reference: float64, or few queries on large maps."""
    value, points = arguments[0], next(a for a in arguments if isinstance(a, Tensor) and a.dim() == 6)
    corners = 4 * points.shape[1] * points.shape[3] * points.shape[4]
    if corners * _READ_PER_ROW < value.shape[1]:
        return f"{points.shape[1]} queries read so little of {value.shape[1]} positions that packing them does not pay"
    return _cpu_backend.passed_over(*arguments)


def _computed(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _channels_together(value: Tensor) -> Tensor:
    """The kernel reads `value` with any strides but the last."""
    return value if value.stride(3) == 1 else value.contiguous()


def _located(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel reads both contiguously, and places points in the dtype that it computes in."""
    return locations.to(_computed(value)).contiguous(), weights.contiguous()


def _raw(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel reads (L, K) of one head contiguously; offsets and logits are of one dtype, value's or float32."""
    if offsets.dtype != logits.dtype:
        offsets, logits = offsets.to(_computed(value)), logits.to(_computed(value))
    if offsets.stride()[3:] != (2 * offsets.shape[4], 2, 1):
        offsets = offsets.contiguous()
    if logits.stride()[3:] != (logits.shape[4], 1):
        logits = logits.contiguous()
    return reference.to(_computed(value)).contiguous(), offsets, logits


def _addresses(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> dict[str, object]:
    return {
        "reference_ptr": reference.data_ptr(),
        "reference_batch": reference.shape[0] if reference.dim() > 2 else 1,
        "reference_levels": reference.shape[2] if reference.dim() > 3 else 1,
        "coordinates": reference.shape[-1],
        "offsets_ptr": offsets.data_ptr(),
        "offsets_strides": offsets.stride()[:3],
        "logits_ptr": logits.data_ptr(),
        "logits_strides": logits.stride()[:3],
        "wide": offsets.dtype != value.dtype,
    }


def _sizes(value: Tensor, points: Tensor, sizes: Sequence[int]) -> dict[str, object]:
    batch, positions, heads, head_dim = value.shape
    return {
        "value_ptr": value.data_ptr(),
        "value_strides": value.stride()[:3],
        "batch": batch,
        "positions": positions,
        "heads": heads,
        "head_dim": head_dim,
        "queries": points.shape[1],
        "points": points.shape[4],
        "spatial_shapes": list(zip(sizes[::2], sizes[1::2], strict=True)),
        "threads": torch.get_num_threads(),
        "dtype": _cpu_backend.DTYPE_CODES[value.dtype],
    }


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _address(tensor: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()


def _in_dtypes_of(grads: Sequence[Tensor | None], given: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]
