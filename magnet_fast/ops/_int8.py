"""A Linear of inference in int8, around one product of oneDNN's.

A weight has one scale for each output, and values -127 to 127, made once. The inputs are looked at when they come, row
by row: the least becomes 0, the greatest 255, so that nothing has to be calibrated and a token with large values
does not coarsen the others. Sums are whole numbers of 32 bits; bias, GELU, ReLU and residual follow in float32. Where
the processor has no instruction for such products (VNNI), the one it has instead adds two of them in 16 bits, which
255 * 127 would overflow: there inputs become 0 to 127.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magnet_fast.ops import _autocast, _cpu_backend
from magnet_fast.ops._view import view

ACTIVATIONS = {None: 0, "gelu": 1, "relu": 2}
WIDTHS = 16
"""What a layer's inputs and outputs must be multiples of."""


class Int8Weight(NamedTuple):
    """A weight (D, C) as `scales` (D) times whole numbers, these as oneDNN reads them, and the sums of its rows."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    totals: Tensor


def quantise(weight: Tensor, rows: int) -> Int8Weight | None:
    """The weight in int8; None where it holds NaN or an infinity.

    Args:
        weight: (D, C), float32 or bfloat16.
        rows: of the product, which the layout is chosen for; it is right for any number.
    """
    weight = weight.float()
    greatest = weight.abs().amax(dim=1)
    if not greatest.isfinite().all():
        return None
    scales = (greatest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    whole = (weight / scales[:, None]).round()
    packed = torch.ops.onednn.qlinear_prepack(whole.to(torch.int8), [rows, weight.shape[1]])
    return Int8Weight(
        packed, scales, torch.zeros(len(weight), dtype=torch.int64, device="cpu"), whole.sum(dim=1) * scales
    )


def linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """`_linear.linear` with a weight of `quantise`, where `works`.

    Args:
        x: (..., C), float32 or bfloat16; bias and residual are of the same dtype.

    Returns:
        (..., D). A row of x that is not finite comes out as NaN.
    """
    outputs = len(weight.scales)
    shape = (*x.shape[:-1], outputs)
    x = _rows(x)
    numbers = x.new_empty(x.shape, dtype=torch.uint8)
    scale, minimum = x.new_empty((2, len(x)), dtype=torch.float32)
    _cpu_backend.extension.rows_to_bytes(
        x=view(x),
        bytes=view(numbers),
        scale=view(scale),
        minimum=view(minimum),
        most=_greatest(),
        threads=torch.get_num_threads(),
    )
    sums = _product(numbers, weight)
    y = sums if x.dtype == sums.dtype else sums.new_empty(sums.shape, dtype=x.dtype)
    # Copies that are made here must live until the call is over: a view keeps nothing alive.
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _rows(residual)
    _cpu_backend.extension.sums_to_rows(
        sums=view(sums),
        scale=view(scale),
        minimum=view(minimum),
        totals=view(weight.totals),
        bias=view(bias),
        activation=ACTIVATIONS[activation],
        residual=view(residual),
        y=view(y),
        threads=torch.get_num_threads(),
    )
    return y.view(shape)


@cache
@_autocast.off
def works() -> bool:
    """Whether this PyTorch has the product, and it is exact where 16 bits would overflow first."""
    if _cpu_backend.missing is not None or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.tensor([[127.0], [-127.0]], dtype=torch.float32, device="cpu").repeat(WIDTHS // 2, 4 * WIDTHS)
    numbers = torch.full((3, weight.shape[1]), _greatest(), dtype=torch.uint8, device="cpu")
    try:
        sums = _product(numbers, quantise(weight, len(numbers)))
    except (AttributeError, TypeError, RuntimeError):  # gone, or called in another way by now
        return False
    return torch.allclose(sums, numbers.float() @ weight.T, rtol=1e-6)


def _product(numbers: Tensor, weight: Int8Weight) -> Tensor:
    whole = (weight.packed, weight.scales, weight.zeros)
    return torch.ops.onednn.qlinear_pointwise(numbers, 1.0, 0, *whole, None, 1.0, 0, torch.float32, "none", [], "")


def _rows(x: Tensor) -> Tensor:
    """(rows, C), each row contiguous."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@cache
def _greatest() -> int:
    return 255 if torch.cpu._is_vnni_supported() else 127
