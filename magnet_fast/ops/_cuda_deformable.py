"""Deformable attention's CUDA kernels, of both forms; see `_cuda_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cuda_backend
from magnet_fast.ops._cpu_deformable import four_dimensions, gradients, inputs
from magnet_fast.ops._view import view

_MOST_LEVELS, _MOST_POINTS = 16, 256


def supports(*arguments: object) -> str | None:
    """None when the kernels can run the call, else the reason why not."""
    places = next(a for a in arguments if isinstance(a, Tensor) and a.dim() == 6)
    _, queries, _, levels, count, _ = places.shape
    if levels > _MOST_LEVELS:
        return f"{levels} maps are not supported, at most {_MOST_LEVELS}"
    if levels * count > _MOST_POINTS:
        return f"{levels * count} points of a query are not supported, at most {_MOST_POINTS}"
    if queries * levels * count >= 2**31:
        return f"{queries} queries of {levels * count} points are not supported, 2^31 points at most"
    return _cuda_backend.supports(*arguments)


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
    return _backward(grad_out, *given, None, sizes, (*wanted, False))[:3]


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
    want_value, want_reference, want_offsets, want_logits = wanted
    grad_value, grad_offsets, grad_logits, grad_reference = _backward(
        grad_out,
        value,
        sampling_offsets,
        attention_logits,
        reference_points,
        sizes,
        (want_value, want_offsets, want_logits, want_reference),
    )
    return [grad_value, grad_reference, grad_offsets, grad_logits]


def _forward(value: Tensor, places: Tensor, weights: Tensor, reference: Tensor | None, sizes: Sequence[int]) -> Tensor:
    out = value.new_empty((value.shape[0], places.shape[1], value.shape[2] * value.shape[3]))
    tensors = _laid_out(value, places, weights, reference)
    _cuda_backend.extension.deformable_attention_forward(out=view(out), **_place(value), **inputs(*tensors, sizes))
    return out


def _backward(
    grad_out: Tensor | None,
    value: Tensor,
    places: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    sizes: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of value, places, weights and the reference points."""
    given = (value, places, weights, reference)
    # The kernel sums those of the reference points in float32.
    dtypes = (value.dtype, places.dtype, weights.dtype, torch.float32)
    grads = [
        torch.empty(tensor.shape, dtype=dtype, device=value.device) if want else None
        for tensor, dtype, want in zip(given, dtypes, wanted, strict=True)
    ]
    if grad_out is None:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    else:
        if grad_out.stride(2) != 1:  # for one, the expanded gradient of a sum
            grad_out = grad_out.contiguous()
        tensors = _laid_out(*given)
        *others, grad_reference = grads
        arguments = {
            "grad_out": view(grad_out),
            **gradients([*others, None if grad_reference is None else four_dimensions(grad_reference)]),
            **_place(value),
            **inputs(*tensors, sizes),
        }
        size = _cuda_backend.extension.deformable_attention_workspace(**arguments)
        workspace = _cuda_backend.workspace(size, value)
        _cuda_backend.extension.deformable_attention_backward(workspace=view(workspace), **arguments)
    return _cuda_backend.in_dtypes_of(grads, given)


def _laid_out(
    value: Tensor, places: Tensor, weights: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the kernels take: the channels of a head, and the points of a query and head, stand together."""
    count = places.shape[4]
    if value.stride(3) != 1:
        value = value.contiguous()
    if places.stride()[3:] != (2 * count, 2, 1):
        places = places.contiguous()
    if weights.stride()[3:] != (count, 1):
        weights = weights.contiguous()
    if reference is not None:
        if reference.stride(-1) != 1:
            reference = reference.contiguous()
        reference = four_dimensions(reference)
    return value, places, weights, reference


def _place(value: Tensor) -> dict[str, object]:
    place = _cuda_backend.place(value)
    del place["tf32"]  # no product here is made on tensor cores
    return place
