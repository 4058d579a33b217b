"""Deformable attention's C++ kernels; see :mod:`._cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cpu_backend


def forward(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Arguments as the reference's; any strides."""
    value, locations, weights = _laid_out(value, sampling_locations, attention_weights)
    out = value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))
    _cpu_backend.extension.deformable_attention_forward(
        out_ptr=out.data_ptr(), **_inputs(value, locations, weights, sizes)
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
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if want else None
        for tensor, want in zip((value, sampling_locations, attention_weights), wanted, strict=True)
    ]
    if grad_out is None:
        return [None if grad is None else grad.zero_() for grad in grads]
    value, locations, weights = _laid_out(value, sampling_locations, attention_weights)
    grad_out = grad_out.contiguous()
    addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
    _cpu_backend.extension.deformable_attention_backward(
        grad_out_ptr=grad_out.data_ptr(),
        grad_value_ptr=addresses[0],
        grad_locations_ptr=addresses[1],
        grad_weights_ptr=addresses[2],
        **_inputs(value, locations, weights, sizes),
    )
    return grads


def _laid_out(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel reads ``value`` with any strides but the last, and the points contiguously."""
    if value.stride(3) != 1:
        value = value.contiguous()
    return value, locations.contiguous(), weights.contiguous()


def _inputs(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> dict[str, object]:
    batch, positions, heads, head_dim = value.shape
    return {
        "value_ptr": value.data_ptr(),
        "value_strides": value.stride()[:3],
        "locations_ptr": locations.data_ptr(),
        "weights_ptr": weights.data_ptr(),
        "batch": batch,
        "positions": positions,
        "heads": heads,
        "head_dim": head_dim,
        "queries": locations.shape[1],
        "points": locations.shape[4],
        "spatial_shapes": list(zip(sizes[::2], sizes[1::2], strict=True)),
        "threads": torch.get_num_threads(),
    }
