"""Window attention under a Swin block, whatever its framework calls the parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magnet_fast import ops

COSINE = "Swin v2: cosine similarity with a learned scale and a bias from an MLP, which the operator does not have"


def attend(
    qkv: Tensor,
    bias_table: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    pad_first: bool,
) -> Tensor:
    """(B, H, W, 3*C) to (B, H, W, C); a function of its own so that torch.fx takes it as one node."""
    return ops.window_attention(
        qkv,
        bias_table,
        num_heads=num_heads,
        window_size=window_size,
        shift=shift,
        pad_qkv=qkv_bias,
        scale=scale,
        pad_first=pad_first,
    )


torch.fx.wrap("attend")


def table_fits(table: Tensor, window_size: tuple[int, int], num_heads: int) -> bool:
    """Whether the relative position bias table is that of Swin v1 for this window."""
    return tuple(table.shape) == ((2 * window_size[0] - 1) * (2 * window_size[1] - 1), num_heads)


OTHER_SOFTMAX = "its softmax is not over the keys"
OTHER_SCALE = "its scale is not that of its heads' width"


def standard_scale(qkv: nn.Linear, num_heads: int) -> float:
    """One over the root of a head's width, for a projection to queries, keys and values."""
    return (qkv.out_features // 3 // num_heads) ** -0.5


def dropout_note(probability: float) -> str | None:
    """What a report says of attention dropout."""
    if not probability:
        return None
    return f"attention dropout {probability:g}: in training the original runs"
