"""timm's SwinTransformer: windows of a block on the unshifted, unpadded map."""

from __future__ import annotations

from torch import Tensor, nn

from . import _window
from ._replacement import Replacement, must_run_original, names, plain_linear


class _Block:
    """A block of timm's SwinTransformer whose attention reads the map where it lies.

    Only `_attn`, what stands between norm1 and the residual, is replaced. timm rolls the map and pads it then, which is
    `pad_first=False`.
    """

    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        dropped = attn.attn_drop.p > 0 and attn.attn_drop.training
        if dropped or must_run_original(attn, attn.softmax, attn.attn_drop) or not plain_linear(attn.qkv):
            return super()._attn(x)
        attended = _window.attend(
            attn.qkv(x),
            attn.relative_position_bias_table,
            attn.qkv.bias,
            attn.num_heads,
            tuple(self.window_size),
            tuple(self.shift_size),
            attn.scale,
            pad_first=False,
        )
        return attn.proj_drop(attn.proj(attended))


def _unfit(block: nn.Module) -> str | None:
    attn = block.attn
    if not plain_linear(attn.qkv):
        return f"its qkv projection is a {type(attn.qkv).__qualname__}, not a plain Linear"
    if not _window.table_fits(attn.relative_position_bias_table, block.window_size, attn.num_heads):
        return "its relative position bias table is not that of Swin v1 for its window"
    return None


REPLACEMENTS = (
    Replacement(
        path="timm.models.swin_transformer.SwinTransformerBlock",
        mixin=_Block,
        operator="window_attention",
        parameters={"_attn": (names("x"), names()), "forward": (names("x"), names())},
        attributes=(
            "window_size",
            "shift_size",
            "attn.qkv",
            "attn.relative_position_bias_table",
            "attn.num_heads",
            "attn.scale",
            "attn.softmax",
            "attn.attn_drop.p",
            "attn.proj",
            "attn.proj_drop",
        ),
        passed_over={"attn": "timm.models.swin_transformer.WindowAttention"},
        unfit=_unfit,
        note=lambda block: _window.dropout_note(block.attn.attn_drop.p),
    ),
)

LEFT_ALONE = {
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _window.COSINE,
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": _window.COSINE,
}
