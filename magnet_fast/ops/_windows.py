"""Maps cut into windows, and tables over the distance of tokens, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(x: Tensor, pad_qkv: Tensor | None, padded_h: int, padded_w: int) -> Tensor:
    """A map (B, H, W, C) with tokens equal to `pad_qkv`, zeros without it, appended at the bottom and right."""
    batch, height, width, channels = x.shape
    if pad_qkv is None:
        if (height, width) == (padded_h, padded_w):
            return x
        return F.pad(x, (0, 0, 0, padded_w - width, 0, padded_h - height))
    pad_qkv = pad_qkv.to(x.dtype)
    if padded_w > width:
        x = torch.cat([x, pad_qkv.expand(batch, height, padded_w - width, channels)], 2)
    if padded_h > height:
        x = torch.cat([x, pad_qkv.expand(batch, padded_h - height, padded_w, channels)], 1)
    return x


def diagonals(x: Tensor, size: int) -> Tensor:
    """(..., 2*size-1) -> (..., size, size) with `y[i, j] = x[i - j + size - 1]`.

    Rows of length 2*size read with a stride of 2*size - 1 move one place to the right from row to row.
    """
    x = F.pad(x.flip(-1), (0, 1)).unsqueeze(-2).expand(*x.shape[:-1], size, 2 * size)
    x = x.flatten(-2)[..., : size * (2 * size - 1)].unflatten(-1, (size, 2 * size - 1))
    return x[..., size - 1 :]
