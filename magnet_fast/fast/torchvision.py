"""torchvision's swin_t, swin_s and swin_b: the attention module already takes a map and returns one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.fast import _window
from magnet_fast.fast._as_made import held, own_index
from magnet_fast.fast._replacement import Replacement, must_run_original, names
from magnet_fast.ops._linear import plain_linear


class _Attention:
    """torchvision's ShiftedWindowAttention on the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.attention_dropout > 0 and self.training
        if dropped or must_run_original(self, self.qkv, self.proj) or not plain_linear(self.qkv, self.proj):
            return super().forward(x)
        attended = _attend(
            self.qkv(x),
            self.relative_position_bias_table,
            self.qkv.bias,
            self.num_heads,
            tuple(self.window_size),
            tuple(self.shift_size),
            (self.qkv.in_features // self.num_heads) ** -0.5,
        )
        return F.dropout(self.proj(attended), p=self.dropout, training=self.training)


def _attend(
    qkv: Tensor,
    bias_table: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Without a shift along a side that one window covers; torch.fx takes it as one node."""
    sides = zip(shift, window, qkv.shape[1:3], strict=True)
    shift = tuple(0 if extent >= length else by for by, extent, length in sides)
    return _window.attend(qkv, bias_table, qkv_bias, num_heads, window, shift, scale, pad_first=True)


torch.fx.wrap("_attend")


def _unfit(attention: nn.Module) -> str | None:
    if not plain_linear(attention.qkv, attention.proj):
        return "its projections are not plain Linears"
    table = held(attention, "relative_position_bias_table")
    if not _window.table_fits(table, tuple(attention.window_size), attention.num_heads):
        return "its relative position bias table is not that of Swin v1 for its window"
    if not own_index(attention, tuple(attention.window_size)):
        return "its relative position index is not that of Swin v1"
    return None


REPLACEMENTS = (
    Replacement(
        path="torchvision.models.swin_transformer.ShiftedWindowAttention",
        mixin=_Attention,
        operator="window_attention",
        parameters={"forward": (names("x"), names())},
        attributes=(
            "window_size",
            "shift_size",
            "num_heads",
            "attention_dropout",
            "dropout",
            "qkv",
            "proj",
            "relative_position_bias_table",
        ),
        bypassed={},
        unfit=_unfit,
        note=lambda attention: _window.dropout_note(attention.attention_dropout),
    ),
)

LEFT_ALONE = {
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _window.COSINE,
}
