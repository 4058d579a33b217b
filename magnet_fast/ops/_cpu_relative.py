"""Relative attention's C++ kernels; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import view


def forward(qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad_qkv: Tensor | None, *settings) -> Tensor:
    """Arguments as the reference's; `qkv` may be any view with a contiguous last dimension."""
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    rel_height, rel_width, pad_qkv = _laid_out(qkv, rel_height, rel_width, pad_qkv)
    _cpu_backend.extension.relative_attention_forward(
        qkv=view(qkv),
        rel_height=view(rel_height),
        rel_width=view(rel_width),
        pad_qkv=view(pad_qkv),
        out=view(out),
        settings=settings,
        threads=torch.get_num_threads(),
    )
    return out


def backward(
    grad_out: Tensor | None, qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad_qkv: Tensor | None, *rest
) -> list[Tensor | None]:
    """Gradients of `qkv`, both tables and `pad_qkv`, None for those not wanted."""
    *settings, wanted = rest
    inputs = (qkv, rel_height, rel_width, pad_qkv)
    # The kernel sums the small ones in float32, or in float64 for float64.
    dtypes = (qkv.dtype, *[_cpu_backend.computed(qkv)] * 3)
    both = wanted[1] or wanted[2]  # the kernel makes the tables' gradients together
    grads = [
        tensor.new_empty(tensor.shape, dtype=dtype) if want and tensor is not None else None
        for tensor, dtype, want in zip(inputs, dtypes, (wanted[0], both, both, wanted[3]), strict=True)
    ]
    if grad_out is None:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    else:
        if grad_out.stride(3) != 1:  # for one, the expanded gradient of a sum
            grad_out = grad_out.contiguous()
        rel_height, rel_width, pad_qkv = _laid_out(*inputs)
        _cpu_backend.extension.relative_attention_backward(
            grad_out=view(grad_out),
            qkv=view(qkv),
            rel_height=view(rel_height),
            rel_width=view(rel_width),
            pad_qkv=view(pad_qkv),
            grad_qkv=view(grads[0]),
            grad_rel_height=view(grads[1]),
            grad_rel_width=view(grads[2]),
            grad_pad_qkv=view(grads[3]),
            settings=tuple(settings),
            threads=torch.get_num_threads(),
        )
    return [
        grad.to(tensor.dtype) if want and grad is not None else None
        for tensor, grad, want in zip(inputs, grads, wanted, strict=True)
    ]


def _laid_out(
    qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad_qkv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tables as the kernel reads them, and the padding token beside the tokens."""
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(qkv.dtype).contiguous()
    tables = (table.to(_cpu_backend.computed(qkv)).contiguous() for table in (rel_height, rel_width))
    return *tables, pad_qkv
