"""Attention of windows on a GPU as people write it: PyTorch moves the data, SDPA or FlexAttention attends."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.window_shapes import Shape
from magnet_fast.ops._window_attention import _region_mask, _relative_position_bias, window_attention_reference
from magnet_fast.ops._windows import diagonals, padded

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager(shape: Shape, qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """The operator's reference."""
    w, shift = shape.window, shape.shift
    d = shape.channels // shape.heads
    return window_attention_reference(qkv, table, pad, shape.heads, w, w, shift, shift, d**-0.5, True)


def sdpa(shape: Shape, qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """Pad, roll, partition, `scaled_dot_product_attention` with bias and mask, and all of it back."""

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        bias = bias[None]
        if mask is not None:
            bias = (bias + mask).repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))

    return _around(shape, qkv, table, pad, attend)


def flex(shape: Shape, qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """The same around FlexAttention, whose score_mod adds bias and mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        def add(score, window, head, q, k):
            score = score + bias[head, q, k]
            return score if mask is None else score + mask[window % mask.shape[0], 0, q, k]

        return _flex_attention()(query, key, value, score_mod=add)

    return _around(shape, qkv, table, pad, attend)


@lru_cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _around(shape: Shape, qkv: Tensor, table: Tensor, pad: Tensor, attend: Attend) -> Tensor:
    w, shift, heads = shape.window, shape.shift, shape.heads
    batch, height, width, _ = qkv.shape
    rows, columns = -(-height // w), -(-width // w)
    x = padded(qkv, pad, rows * w, columns * w)
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    x = x.view(batch, rows, w, columns, w, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = x.reshape(3, batch * rows * columns, heads, w * w, -1)
    bias = _relative_position_bias(table.float(), w, w)
    mask = _region_mask(rows, columns, w, w, shift, shift, bias) if shift else None
    out = attend(query, key, value, bias, mask)
    out = out.view(batch, rows, columns, heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * w, columns * w, shape.channels)
    if shift:
        out = torch.roll(out, (shift, shift), (1, 2))
    return out[:, :height, :width].contiguous()


def relative_sdpa(
    heads: int, window: tuple[int, int], qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad: Tensor | None
) -> Tensor:
    """SAM's attention: pad, partition, the positions' mask of all pairs, `scaled_dot_product_attention` with it, and
    back."""
    batch, height, width, _ = qkv.shape
    window_h, window_w = window
    rows, columns = -(-height // window_h), -(-width // window_w)
    x = padded(qkv, pad, rows * window_h, columns * window_w)
    x = x.view(batch, rows, window_h, columns, window_w, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = x.reshape(3, batch * rows * columns, heads, window_h, window_w, -1)
    by_row = torch.einsum("bnyxd,dyz->bnyxz", query, diagonals(rel_height.t(), window_h))
    by_column = torch.einsum("bnyxd,dxz->bnyxz", query, diagonals(rel_width.t(), window_w))
    mask = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2).flatten(2, 3)
    out = F.scaled_dot_product_attention(*(part.flatten(2, 3) for part in (query, key, value)), attn_mask=mask)
    out = out.view(batch, rows, columns, heads, window_h, window_w, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, rows * window_h, columns * window_w, -1)[:, :height, :width].contiguous()
