"""Sine position encoding of a feature map, as DETR and Mask2Former use it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, H·W, channels): channels/2 for the row, then channels/2 for the column.

    Coordinates run 1…n normalised to (0, 2π]; frequencies are 10000^(-2⌊i/2⌋/(channels/2)), sine and cosine alternate.
    """
    half = channels // 2
    index = torch.arange(half, device=device, dtype=torch.float32)
    frequency = 10000.0 ** (-2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, device=device, dtype=torch.float32)
        angle = (steps / (count + 1e-6) * 2 * math.pi)[:, None] * frequency
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    rows = encode(height)[:, None, :].expand(height, width, half)
    columns = encode(width)[None, :, :].expand(height, width, half)
    return torch.cat((rows, columns), dim=2).reshape(1, height * width, channels).to(dtype)
