"""Window attention's Triton kernels; see `_triton_backend` for when they can run."""

from __future__ import annotations

import torch
from torch import Tensor

from magnet_fast.ops import _triton_backend
from magnet_fast.ops._window_settings import WindowSettings

# As in `magnet_fast.kernels.window_attention`, which cannot be asked before Triton is imported.
_LARGEST_WINDOW, _LARGEST_WINDOW_OF_WIDE = 256, 144
_LARGEST_IMAGE = 2**31 - 1
_NARROW_HEAD, _LARGEST_HEAD = 32, 64


def supports(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> str | None:
    """None when the kernels can run these arguments, else the reason why not."""
    num_heads, window_h, window_w, *_ = WindowSettings(*settings)
    d = qkv.shape[3] // 3 // num_heads
    if window_h * window_w > _LARGEST_WINDOW:
        return f"a window of {window_h}x{window_w} tokens is not supported, at most {_LARGEST_WINDOW} tokens"
    if d > _LARGEST_HEAD:
        return f"{d} channels a head are not supported, at most {_LARGEST_HEAD}"
    if d > _NARROW_HEAD and window_h * window_w > _LARGEST_WINDOW_OF_WIDE:
        limit = f"at most {_LARGEST_WINDOW_OF_WIDE} tokens with more than {_NARROW_HEAD} channels a head"
        return f"a window of {window_h}x{window_w} tokens is not supported, {limit}"
    _, height, width, channels = qkv.shape
    span = max(height * width * channels, (height - 1) * qkv.stride(1) + (width - 1) * qkv.stride(2) + channels)
    if span > _LARGEST_IMAGE:
        return f"an image of {span} numbers is not supported, at most {_LARGEST_IMAGE}"
    return _triton_backend.supports(qkv)


def forward(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    from magnet_fast.kernels.window_attention import window_attention_forward

    return window_attention_forward(qkv, bias_table, pad_qkv, *settings)


def backward(
    grad_out: Tensor | None, qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *rest
) -> list[Tensor | None]:
    """Gradients of `qkv`, `bias_table` and `pad_qkv`, None for those not wanted."""
    from magnet_fast.kernels.window_attention import window_attention_backward

    if grad_out is None:
        inputs, wanted = (qkv, bias_table, pad_qkv), rest[-1]
        return [
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if want and tensor is not None else None
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
    return window_attention_backward(grad_out, qkv, bias_table, pad_qkv, *rest)
