"""Attention with decomposed relative positions under a block of SAM's kind, whatever its library calls the parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.fast import _window
from magnet_fast.fast._as_made import held
from magnet_fast.ops._linear import plain_linear

NO_TABLES = "it has no relative positions: PyTorch's own attention serves it"


def attend(
    qkv: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
) -> Tensor:
    """(B, H, W, 3*C) to (B, H, W, C), in windows or (0) over the whole map, whose tables are resized to it.

    A function of its own so that torch.fx takes it as one node.
    """
    height, width = (window_size, window_size) if window_size else qkv.shape[1:3]
    return ops.relative_attention(
        qkv,
        _resized(rel_height, height),
        _resized(rel_width, width),
        num_heads=num_heads,
        window_size=window_size or None,
        pad_qkv=qkv_bias,
        scale=scale,
    )


torch.fx.wrap("attend")


def _resized(table: Tensor, side: int) -> Tensor:
    """The table of another side, as SAM's code makes it: linearly between its rows."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.t()[None], size=2 * side - 1, mode="linear")[0].t()


def _pytorchs_own(attention: nn.Module) -> bool:
    """Whether it calls PyTorch's attention, which does not read the module's scale: a form in transformers, a switch in
    timm."""
    return getattr(attention, "fused_attn", False) or type(attention).__name__.endswith("SdpaAttention")


def unfit(attention: nn.Module, num_heads: int) -> str | None:
    """Why the operator does not fit an attention that has tables, or None."""
    if not plain_linear(attention.qkv):
        return f"its qkv projection is a {type(attention.qkv).__qualname__}, not a plain Linear"
    if attention.qkv.out_features != 3 * attention.qkv.in_features or attention.qkv.in_features % num_heads:
        return "its qkv projection does not make queries, keys and values of its input's width"
    d = attention.qkv.in_features // num_heads
    if _pytorchs_own(attention) and attention.scale != d**-0.5:
        return _window.OTHER_SCALE
    if any(
        table.dim() != 2 or table.shape[1] != d
        for table in (held(attention, "rel_pos_h"), held(attention, "rel_pos_w"))
    ):
        return "its tables of relative positions are not those of one head's channels"
    return None
