"""Position encodings of maps and words: sines as DETR and Mask2Former use them, plain ones, and SAM's random
frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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


def place_code(y: Tensor, x: Tensor, channels: int, temperature: float) -> Tensor:
    """(…, channels) for places y and x (…) in [0, 1]: channels/2 for the row, then channels/2 for the column.

    As `sine_position`, but for any place: 0 to 1 is an angle from 0 to 2π, frequencies are
    temperature^(-2⌊i/2⌋/(channels/2)). 10000 is for long lines: most of its channels hardly change over a picture.
    20 is DAB-DETR's (Liu et al., ICLR 2022).
    """
    half = channels // 2
    index = torch.arange(half, device=y.device, dtype=torch.float32)
    frequency = temperature ** (-2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(place: Tensor) -> Tensor:
        angle = 2 * math.pi * place.to(torch.float32)[..., None] * frequency
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)

    return torch.cat((encode(y), encode(x)), dim=-1)


def line_position(count: int, channels: int, like: Tensor) -> Tensor:
    """(count, channels): sine at even, cosine at odd channels of position · 10000^(-2i / channels)."""
    index = torch.arange(0, channels, 2, device=like.device, dtype=torch.float32)
    angle = torch.arange(count, device=like.device, dtype=torch.float32)[:, None] * 10000.0 ** (-index / channels)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(like.dtype)


def grid_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """(H·W, channels): the first half for the column, the second for the row."""
    columns = line_position(width, channels // 2, like)[None].expand(height, -1, -1)
    rows = line_position(height, channels // 2, like)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class RandomPosition(nn.Module):
    """Sines and cosines of random directions over the unit square (Tancik et al., NeurIPS 2020), as SAM uses them.

    With u the centre of a pixel, column and row, in [0, 1]²: 2π (2u − 1) G. G is fixed, and the same in every new
    instance of a width.

    Args:
        channels: of the encoding; even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(2, channels // 2, generator=generator, device="cpu")  # the same numbers on any device
        self.register_buffer("matrix", matrix.to(torch.get_default_device()))

    def forward(self, height: int, width: int, like: Tensor) -> Tensor:
        """(H·W, channels), sines first, on the device and in the dtype of `like`."""
        matrix = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))

        def centres(count: int) -> Tensor:
            steps = torch.arange(count, device=like.device, dtype=matrix.dtype)
            return 2 * (steps + 0.5) / count - 1

        columns, rows = centres(width)[None, :, None] * matrix[0], centres(height)[:, None, None] * matrix[1]
        angle = 2 * math.pi * (columns + rows).flatten(0, 1)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)
