"""Window attention's CUDA kernels; see `_cuda_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cuda_backend
from magnet_fast.ops._view import view
from magnet_fast.ops._window_settings import WindowSettings

_MOST_TOKENS, _MOST_HEAD_DIM = 256, 64


def supports(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> str | None:
    """None when the kernels can run this, else the reason why not."""
    given = WindowSettings(*settings)
    if given.window_h * given.window_w > _MOST_TOKENS:
        return f"windows of {given.window_h * given.window_w} tokens are not supported, at most {_MOST_TOKENS}"
    head_dim = qkv.shape[3] // 3 // given.num_heads
    if head_dim > _MOST_HEAD_DIM:
        return f"heads of {head_dim} channels are not supported, at most {_MOST_HEAD_DIM}"
    return _cuda_backend.supports(qkv)


def forward(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    bias_table, pad_qkv = _laid_out(qkv, bias_table, pad_qkv)
    _cuda_backend.extension.window_attention_forward(out=view(out), **_inputs(qkv, bias_table, pad_qkv, settings))
    return out


def backward(
    grad_out: Tensor | None, qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *rest
) -> list[Tensor | None]:
    """Gradients of `qkv`, `bias_table` and `pad_qkv`, None for those not wanted."""
    *settings, wanted = rest
    inputs = (qkv, bias_table, pad_qkv)
    # The kernel sums the small ones in float32.
    dtypes = (qkv.dtype, torch.float32, torch.float32)
    grads = [
        torch.empty(tensor.shape, dtype=dtype, device=qkv.device) if want and tensor is not None else None
        for tensor, dtype, want in zip(inputs, dtypes, wanted, strict=True)
    ]
    if grad_out is None:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    else:
        if grad_out.stride(3) != 1:  # for one, the expanded gradient of a sum
            grad_out = grad_out.contiguous()
        bias_table, pad_qkv = _laid_out(qkv, bias_table, pad_qkv)
        arguments = {
            "grad_out": view(grad_out),
            "grad_qkv": view(grads[0]),
            "grad_bias": view(grads[1]),
            "grad_pad_qkv": view(grads[2]),
            **_inputs(qkv, bias_table, pad_qkv, settings),
        }
        workspace = _cuda_backend.workspace(_cuda_backend.extension.window_attention_workspace(**arguments), qkv)
        _cuda_backend.extension.window_attention_backward(workspace=view(workspace), **arguments)
    return _cuda_backend.in_dtypes_of(grads, inputs)


def _laid_out(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The table as the kernel reads it, and the padding token beside the tokens."""
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(qkv.dtype).contiguous()
    return bias_table.to(torch.float32).contiguous(), pad_qkv


def _inputs(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, settings: Sequence[object]) -> dict[str, object]:
    return {
        **_cuda_backend.place(qkv),
        "qkv": view(qkv),
        "bias": view(bias_table),
        "pad_qkv": view(pad_qkv),
        "settings": tuple(settings),
    }
