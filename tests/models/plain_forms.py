"""Layers written out, value by value: what parts are compared with, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from magnet_fast.models.heads.aspp import ASPP


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with every parameter and statistic drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            fan_in = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 4
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn / math.sqrt(fan_in))
    return module


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Tap by tap, (B, C, H, W)."""
    (dilation, _), (stride, _), (size, _), (pad, _) = conv.dilation, conv.stride, conv.kernel_size, conv.padding
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, channels, height + 2 * pad, width + 2 * pad)
    padded[:, :, pad : pad + height, pad : pad + width] = x
    rows, columns = (1 + (side + 2 * pad - dilation * (size - 1) - 1) // stride for side in (height, width))
    total = x.new_zeros(batch, conv.out_channels, rows, columns)
    inner, outer = channels // conv.groups, conv.out_channels // conv.groups
    for group in range(conv.groups):
        into, out = slice(group * inner, (group + 1) * inner), slice(group * outer, (group + 1) * outer)
        for row in range(size):
            for column in range(size):
                top, left = row * dilation, column * dilation
                seen = padded[:, into, top : top + stride * rows : stride, left : left + stride * columns : stride]
                total[:, out] += torch.einsum("bihw,oi->bohw", seen, conv.weight[out, :, row, column])
    return total if conv.bias is None else total + conv.bias[:, None, None]


def normalise(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """BatchNorm in evaluation, (B, C, H, W)."""
    mean, variance, weight, bias = (
        each[:, None, None] for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def conv_block(x: Tensor, block: nn.Sequential) -> Tensor:
    """A convolution, a BatchNorm and a ReLU."""
    return normalise(convolve(x, block[0]), block[1]).clamp(min=0)


def pooled(x: Tensor, block: ASPP) -> Tensor:
    """An ASPP: branches of each dilation and the image's mean, concatenated and projected."""
    seen = [conv_block(x, branch) for branch in block.branches]
    mean = convolve(x.mean(dim=(2, 3), keepdim=True), block.image[1])
    norm = block.image[2]
    if isinstance(norm, nn.BatchNorm2d):
        mean = normalise(mean, norm)
    else:
        mean = layer_norm(mean[:, :, 0, 0], norm)[:, :, None, None]
    seen.append(mean.clamp(min=0).expand_as(seen[0]))
    return conv_block(torch.cat(seen, dim=1), block.project)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.einsum("...i,oi->...o", x, layer.weight) + (0 if layer.bias is None else layer.bias)


def resize(x: Tensor, size: tuple[int, int], aligned: bool = False) -> Tensor:
    """Bilinear, (B, C, H, W) to `size`: the weights of every row and column written down."""
    rows, columns = (_weights(old, new, aligned) for old, new in zip(x.shape[2:], size, strict=True))
    return torch.einsum("ih,bchw,jw->bcij", rows, x, columns)


def _weights(old: int, new: int, aligned: bool) -> Tensor:
    table = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        place = i * (old - 1) / max(new - 1, 1) if aligned else max((i + 0.5) * old / new - 0.5, 0)
        low = min(math.floor(place), old - 1)
        table[i, low] += 1 - (place - low)
        table[i, min(low + 1, old - 1)] += place - low
    return table
