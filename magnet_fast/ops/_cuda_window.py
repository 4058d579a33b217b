"""Window attention's CUDA kernels; see `_cuda_backend` for the extension that holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from magnet_fast.ops import _cuda_backend

_MOST_TOKENS, _MOST_HEAD_DIM = 256, 64


def supports(
    qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, num_heads: int, window_h: int, window_w: int, *rest: object
) -> str | None:
    """None when the kernels can run this, else the reason why not."""
    if window_h * window_w > _MOST_TOKENS:
        return f"windows of {window_h * window_w} tokens are not supported, at most {_MOST_TOKENS}"
    if qkv.shape[3] // 3 // num_heads > _MOST_HEAD_DIM:
        return f"heads of {qkv.shape[3] // 3 // num_heads} channels are not supported, at most {_MOST_HEAD_DIM}"
    return _cuda_backend.supports(qkv)


def forward(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    bias_table, pad_qkv = _laid_out(qkv, bias_table, pad_qkv)
    _cuda_backend.extension.window_attention_forward(
        out_ptr=out.data_ptr(), out_strides=out.stride()[:3], **_inputs(qkv, bias_table, pad_qkv, *settings)
    )
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
            "grad_out_ptr": grad_out.data_ptr(),
            "grad_out_strides": grad_out.stride()[:3],
            "grad_qkv_ptr": _cuda_backend.address(grads[0]),
            "grad_qkv_strides": grads[0].stride()[:3] if grads[0] is not None else (0, 0, 0),
            "grad_bias_ptr": _cuda_backend.address(grads[1]),
            "grad_pad_ptr": _cuda_backend.address(grads[2]),
            **_inputs(qkv, bias_table, pad_qkv, *settings),
        }
        size = _cuda_backend.extension.window_attention_workspace(**arguments)
        workspace = _cuda_backend.workspace(size, qkv)
        _cuda_backend.extension.window_attention_backward(
            workspace_ptr=workspace.data_ptr(), workspace_bytes=size, **arguments
        )
    return _cuda_backend.in_dtypes_of(grads, inputs)


def _laid_out(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The table as the kernel reads it, and the padding token beside the tokens."""
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(qkv.dtype).contiguous()
    return bias_table.to(torch.float32).contiguous(), pad_qkv


def _inputs(
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: bool,
) -> dict[str, object]:
    batch, height, width, channels = qkv.shape
    return {
        **_cuda_backend.place(qkv),
        "qkv_ptr": qkv.data_ptr(),
        "qkv_strides": qkv.stride()[:3],
        "bias_ptr": bias_table.data_ptr(),
        "pad_qkv_ptr": _cuda_backend.address(pad_qkv),
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels // 3,
        "heads": num_heads,
        "window_h": window_h,
        "window_w": window_w,
        "shift_h": shift_h,
        "shift_w": shift_w,
        "scale": scale,
        "pad_first": pad_first,
    }
