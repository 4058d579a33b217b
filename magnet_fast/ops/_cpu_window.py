"""Window attention's C++ kernels; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend


def forward(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    bias_table, pad_qkv = _laid_out(qkv, bias_table, pad_qkv)
    _cpu_backend.extension.window_attention_forward(
        out_ptr=out.data_ptr(), out_strides=out.stride()[:3], **_inputs(qkv, bias_table, pad_qkv, *settings)
    )
    return out


def backward(
    grad_out: Tensor | None, qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *rest
) -> list[Tensor | None]:
    """Gradients of `qkv`, `bias_table` and `pad_qkv`, None for those not wanted."""
    *settings, wanted = rest
    inputs = (qkv, bias_table, pad_qkv)
    # The kernel sums the small ones in float32, or in float64 for float64.
    dtypes = (qkv.dtype, _computed(qkv), _computed(qkv))
    grads = [
        torch.empty(tensor.shape, dtype=dtype) if want and tensor is not None else None
        for tensor, dtype, want in zip(inputs, dtypes, wanted, strict=True)
    ]
    if grad_out is None:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    else:
        _write_gradients(grad_out, *inputs, settings, grads)
    return [None if grad is None else grad.to(tensor.dtype) for tensor, grad in zip(inputs, grads, strict=True)]


def _write_gradients(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    settings: Sequence[object],
    grads: Sequence[Tensor | None],
) -> None:
    if grad_out.stride(3) != 1:  # for one, the expanded gradient of a sum
        grad_out = grad_out.contiguous()
    bias_table, pad_qkv = _laid_out(qkv, bias_table, pad_qkv)
    _cpu_backend.extension.window_attention_backward(
        grad_out_ptr=grad_out.data_ptr(),
        grad_out_strides=grad_out.stride()[:3],
        grad_qkv_ptr=_address(grads[0]),
        grad_qkv_strides=grads[0].stride()[:3] if grads[0] is not None else (0, 0, 0),
        grad_bias_ptr=_address(grads[1]),
        grad_pad_ptr=_address(grads[2]),
        **_inputs(qkv, bias_table, pad_qkv, *settings),
    )


def _computed(qkv: Tensor) -> torch.dtype:
    """What the kernel computes in, and the dtype of the bias that it reads."""
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _laid_out(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The table as the kernel reads it, and the padding token beside the tokens."""
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(qkv.dtype).contiguous()
    return bias_table.to(_computed(qkv)).contiguous(), pad_qkv


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
        "dtype": _cpu_backend.DTYPE_CODES[qkv.dtype],
        "qkv_ptr": qkv.data_ptr(),
        "qkv_strides": qkv.stride()[:3],
        "bias_ptr": bias_table.data_ptr(),
        "pad_qkv_ptr": _address(pad_qkv),
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
        "threads": torch.get_num_threads(),
    }


def _address(tensor: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()
