"""Window attention's C++ kernels; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import view


def forward(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    bias_table, pad_qkv = _laid_out(qkv, bias_table, pad_qkv)
    _cpu_backend.extension.window_attention_forward(
        qkv=view(qkv),
        bias=view(bias_table),
        pad_qkv=view(pad_qkv),
        out=view(out),
        settings=settings,
        threads=torch.get_num_threads(),
    )
    return out


def backward(
    grad_out: Tensor | None, qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, *rest
) -> list[Tensor | None]:
    """Gradients of `qkv`, `bias_table` and `pad_qkv`, None for those not wanted."""
    *settings, wanted = rest
    inputs = (qkv, bias_table, pad_qkv)
    # The kernel sums the small ones in float32, or in float64 for float64.
    dtypes = (qkv.dtype, _cpu_backend.computed(qkv), _cpu_backend.computed(qkv))
    grads = [
        tensor.new_empty(tensor.shape, dtype=dtype) if want and tensor is not None else None
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
        grad_out=view(grad_out),
        qkv=view(qkv),
        bias=view(bias_table),
        pad_qkv=view(pad_qkv),
        grad_qkv=view(grads[0]),
        grad_bias=view(grads[1]),
        grad_pad_qkv=view(grads[2]),
        settings=tuple(settings),
        threads=torch.get_num_threads(),
    )


def _laid_out(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The table as the kernel reads it, and the padding token beside the tokens."""
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(qkv.dtype).contiguous()
    return bias_table.to(_cpu_backend.computed(qkv)).contiguous(), pad_qkv
