"""Relative attention's Triton kernels; see `_triton_backend` for when they can run."""

from __future__ import annotations

import torch
from torch import Tensor

from magnet_fast.ops import _triton_backend

# As in `magnet_fast.kernels.relative_attention`, which cannot be asked before Triton is imported.
_LARGEST_HEAD, _LARGEST_HEAD_OF_FLOAT32 = 128, 64
_LARGEST_IMAGE = 2**31 - 1


def supports(
    qkv: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    *rest: object,
) -> str | None:
    """None when the kernels can run these arguments, else the reason why not."""
    _, height, width, channels = qkv.shape
    d = channels // 3 // num_heads
    if d > _LARGEST_HEAD:
        return f"{d} channels a head are not supported, at most {_LARGEST_HEAD}"
    if d > _LARGEST_HEAD_OF_FLOAT32 and qkv.dtype == torch.float32:
        return f"{d} channels a head are not supported in float32, at most {_LARGEST_HEAD_OF_FLOAT32}"
    span = max(height * width * channels, (height - 1) * qkv.stride(1) + (width - 1) * qkv.stride(2) + channels)
    if span > _LARGEST_IMAGE:
        return f"an image of {span} numbers is not supported, at most {_LARGEST_IMAGE}"
    if (products := height * width * max(window_h, window_w)) > _LARGEST_IMAGE:
        return f"{products} products of a head with a table are not supported, at most {_LARGEST_IMAGE}"
    return _triton_backend.supports(qkv)


def forward(qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    from magnet_fast.kernels.relative_attention import relative_attention_forward

    return relative_attention_forward(qkv, rel_height, rel_width, pad_qkv, *settings)


def backward(
    grad_out: Tensor | None, qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad_qkv: Tensor | None, *rest
) -> list[Tensor | None]:
    """Gradients of `qkv`, both tables and `pad_qkv`, None for those not wanted."""
    from magnet_fast.kernels.relative_attention import relative_attention_backward

    if grad_out is None:
        inputs, wanted = (qkv, rel_height, rel_width, pad_qkv), rest[-1]
        return [
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if want and tensor is not None else None
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
    return relative_attention_backward(grad_out, qkv, rel_height, rel_width, pad_qkv, *rest)
