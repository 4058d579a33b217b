"""Rivals of the fused operators, written as people write them: roll, pad, partition, mask, attend, put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast.models.encoders.swin import WindowAttention


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: int,
    shift: int,
    pad_qkv: Tensor,
    fused_softmax: bool,
) -> Tensor:
    """What Swin implementations do around attention, on (B, H, W, 3C); `fused_softmax` takes PyTorch's SDPA.

    Index and mask are kept between calls, as those implementations keep them in buffers.
    """
    batch, height, width, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    w = window_size
    bottom, right = -height % w, -width % w
    if bottom or right:
        padded = pad_qkv.expand(batch, height + bottom, width + right, 3 * channels).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
    rows, columns = qkv.shape[1] // w, qkv.shape[2] // w
    windows = qkv.view(batch, rows, w, columns, w, 3, num_heads, channels // num_heads)
    query, key, value = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch * rows * columns, num_heads, w * w, -1)
    bias = bias_table[_relative_index(w)].view(w * w, w * w, num_heads).permute(2, 0, 1)[None]
    if shift:
        mask = _shift_mask(rows * w, columns * w, w, shift).to(bias.dtype)  # (windows, N, N)
        bias = (bias + mask[:, None].to(bias.dtype)).repeat(batch, 1, 1, 1)
    if fused_softmax:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    else:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        out = scores.softmax(dim=-1) @ value
    out = out.view(batch, rows, columns, num_heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * w, columns * w, channels)
    if shift:
        out = torch.roll(out, (shift, shift), (1, 2))
    return out[:, :height, :width].contiguous()


@lru_cache
def compiled_window_attention() -> Callable[..., Tensor]:
    """`window_attention` by torch.compile; every new shape compiles for a while."""
    return torch.compile(window_attention, dynamic=False)


@contextmanager
def models_use_plain_attention(fused_softmax: bool) -> Iterator[None]:
    """Within the context every Swin block of our models, unless accelerated, runs `window_attention` of this file."""

    def forward(self: WindowAttention, x: Tensor) -> Tensor:
        attended = window_attention(
            self.qkv(x),
            self.bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            pad_qkv=self.qkv.bias,
            fused_softmax=fused_softmax,
        )
        return self.proj(attended)

    original = WindowAttention.forward
    WindowAttention.forward = forward
    try:
        yield
    finally:
        WindowAttention.forward = original


@lru_cache
def _relative_index(w: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return ((y[:, None] - y + w - 1) * (2 * w - 1) + x[:, None] - x + w - 1).flatten()


@lru_cache
def _shift_mask(height: int, width: int, w: int, shift: int) -> Tensor:
    def regions(size: int) -> Tensor:
        position = torch.arange(size)
        return (position >= size - w).long() + (position >= size - shift).long()

    region = regions(height)[:, None] * 3 + regions(width)
    region = region.view(height // w, w, width // w, w).permute(0, 2, 1, 3).reshape(-1, w * w)
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
