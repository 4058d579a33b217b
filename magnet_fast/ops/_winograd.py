"""3 x 3 convolutions of float32 by Winograd's algorithm: fewer multiplications (C++, CPU, inference).

Four outputs and the sixteen inputs around them take 16 multiplications for each pair of channels, where the sum takes
36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, F(2 x 2, 3 x 3)). Results differ
from the sum's by two to three times its own rounding. What is not finite spreads: where a window holds an infinity or
NaN, its neighbours within two pixels may become NaN as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import view

_FEWEST_TILES = 24
"""Of 2 x 2 outputs, for each thread: with fewer, reading the weights, which are 16 for 9, takes longer than the sum."""


def takes(convolution: nn.Conv2d, x: Tensor) -> bool:
    """Whether `run` computes this convolution of `x`, and faster than oneDNN does.

    Args:
        convolution: whose bias may be another, and whose output may be rectified.
        x: (B, C, H, W).
    """
    if _cpu_backend.extension is None or x.dtype != torch.float32:
        return False
    weight = convolution.weight
    batch, _, height, width = x.shape
    tiles = batch * ((height + 1) // 2) * ((width + 1) // 2)
    return (
        convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.dilation == convolution.padding == (1, 1)
        and convolution.groups == 1
        and level() != "portable"
        and tiles >= _FEWEST_TILES * torch.get_num_threads()
        and not any(
            channels % _cpu_backend.extension.winograd_step(weight=view(weight)) for channels in weight.shape[:2]
        )
    )


def level() -> str:
    """The SIMD level in use: a packed weight holds for one of them."""
    return _cpu_backend.extension.simd_level()


def pack(weight: Tensor) -> Tensor:
    """weight (D, C, 3, 3) as `run` takes it: (16, C, D)."""
    weight = weight.contiguous()  # alive during the call
    outputs, inputs = weight.shape[:2]
    room = weight.new_empty(16 * inputs * outputs + 64)
    first = -room.data_ptr() % 64 // weight.element_size()
    packed = room[first:][: 16 * inputs * outputs].view(16, inputs, outputs)
    _cpu_backend.extension.winograd_pack(weight=view(weight), packed=view(packed))
    return packed


def run(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None = None, rectify: bool = False
) -> Tensor:
    """The convolution, plus the residual, and ReLU of that.

    Args:
        x: (B, C, H, W).
        packed: from `pack`.
        bias: (D) or None.
        residual: (B, D, H, W) or None.
        rectify: ReLU at the end.

    Returns:
        (B, D, H, W), channels last.
    """
    batch, _, height, width = x.shape
    y = x.new_empty((batch, height, width, packed.shape[2]))
    x, residual = _channels_last(x), None if residual is None else _channels_last(residual)  # alive during the call
    _cpu_backend.extension.winograd_forward(
        x=view(x),
        packed=view(packed),
        bias=view(bias),
        residual=view(residual),
        rectify=rectify,
        y=view(y),
        threads=torch.get_num_threads(),
    )
    return y.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """(B, H, W, C), channels side by side."""
    x = x.permute(0, 2, 3, 1)
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
