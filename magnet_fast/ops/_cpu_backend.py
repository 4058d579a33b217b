"""The C++ kernels of the torch-free extension `magnet_fast._cpu`: loading it, and what goes into it."""

from __future__ import annotations

# The extension must find torch's OpenMP runtime loaded: one thread pool then serves both.
import torch
from torch import Tensor

from ._checks import dtype_name

try:
    from .. import _cpu as extension
except ModuleNotFoundError:
    extension, missing = None, "extension magnet_fast._cpu is not built"
except ImportError as error:
    extension, missing = None, f"extension magnet_fast._cpu cannot be loaded: {error}"
else:
    missing = None
"""Why the extension cannot be used, or None."""


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""What the extension is told of a tensor's dtype: csrc/common/elements.h."""


def supports_any_dtype(*arguments: object) -> str | None:
    """None when the arguments' tensors are on the CPU, else the reason why not."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    return None if first.device.type == "cpu" else f"device {first.device.type} is not supported, CPU tensors only"


def supports(*arguments: object) -> str | None:
    """As `supports_any_dtype`, for kernels that take float32 only."""
    reason = supports_any_dtype(*arguments)
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    if reason is None and first.dtype != torch.float32:
        reason = f"dtype {dtype_name(first.dtype)} is not supported, float32 only"
    return reason


def window_attention_forward(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; ``qkv`` may be any view with a contiguous last dimension."""
    sizes = _window_sizes(qkv, *settings)
    bias_table, pad_qkv = bias_table.contiguous(), _contiguous(pad_qkv)
    out = qkv.new_empty((*qkv.shape[:3], sizes["channels"]))
    extension.window_attention_forward(
        qkv_ptr=qkv.data_ptr(),
        qkv_strides=qkv.stride()[:3],
        bias_ptr=bias_table.data_ptr(),
        pad_qkv_ptr=_address(pad_qkv),
        out_ptr=out.data_ptr(),
        out_strides=out.stride()[:3],
        **sizes,
    )
    return out


def window_attention_backward(
    grad_out: Tensor | None,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    *rest,
) -> list[Tensor | None]:
    """Gradients of ``qkv``, ``bias_table`` and ``pad_qkv``, None for those not wanted."""
    *settings, wanted = rest
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if want and tensor is not None else None
        for tensor, want in zip((qkv, bias_table, pad_qkv), wanted, strict=True)
    ]
    if grad_out is None:
        return [None if grad is None else grad.zero_() for grad in grads]
    sizes = _window_sizes(qkv, *settings)
    bias_table, pad_qkv = bias_table.contiguous(), _contiguous(pad_qkv)
    if grad_out.stride(3) != 1:  # for one, the expanded gradient of a sum
        grad_out = grad_out.contiguous()
    extension.window_attention_backward(
        grad_out_ptr=grad_out.data_ptr(),
        grad_out_strides=grad_out.stride()[:3],
        qkv_ptr=qkv.data_ptr(),
        qkv_strides=qkv.stride()[:3],
        bias_ptr=bias_table.data_ptr(),
        pad_qkv_ptr=_address(pad_qkv),
        grad_qkv_ptr=_address(grads[0]),
        grad_qkv_strides=grads[0].stride()[:3] if grads[0] is not None else (0, 0, 0),
        grad_bias_ptr=_address(grads[1]),
        grad_pad_ptr=_address(grads[2]),
        **sizes,
    )
    return grads


def _window_sizes(
    qkv: Tensor,
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


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()
