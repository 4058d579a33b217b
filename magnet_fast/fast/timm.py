"""timm's SwinTransformer: windows of a block on the unshifted, unpadded map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magnet_fast.fast import _block, _window
from magnet_fast.fast._as_made import as_made, held, own_index
from magnet_fast.fast._replacement import Replacement, must_run_original, names, parts_changed
from magnet_fast.ops._linear import linear, plain_linear

_DROP_PATH = (*_block.IDENTITY, "timm.layers.drop.DropPath")
_PARTS = {
    "norm1": _block.NORM,
    "attn": ("timm.models.swin_transformer.WindowAttention",),
    "attn.qkv": _block.LINEAR,
    "attn.attn_drop": _block.DROPOUT,
    "attn.proj": _block.LINEAR,
    "attn.proj_drop": _block.DROPOUT,
    "attn.softmax": ("torch.nn.modules.activation.Softmax",),
    "drop_path1": _DROP_PATH,
    "norm2": _block.NORM,
    "mlp": ("timm.layers.mlp.Mlp",),
    "mlp.fc1": _block.LINEAR,
    "mlp.act": _block.GELU,
    "mlp.drop1": _block.DROPOUT,
    "mlp.norm": _block.IDENTITY,
    "mlp.fc2": _block.LINEAR,
    "mlp.drop2": _block.DROPOUT,
    "drop_path2": _DROP_PATH,
}


class _Block:
    """A block of timm's SwinTransformer whose attention reads the map where it lies.

    Replaced is `_attn`, what stands between norm1 and the residual, and, in inference on a CPU, the whole block. timm
    rolls the map and pads it then, which is `pad_first=False`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _block.runs_whole(self, x, _PARTS):
            return super().forward(x)

        def attend(x: Tensor) -> Tensor:
            return self._attend(linear(self.norm1(x), self.attn.qkv.weight, self.attn.qkv.bias))

        return _block.forward(x, attend, self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)

    def _attn(self, x: Tensor) -> Tensor:
        if parts_changed(self):
            return super()._attn(x)
        attn = self.attn
        dropped = attn.attn_drop.p > 0 and attn.attn_drop.training
        if (
            dropped
            or not plain_linear(attn.qkv)
            or must_run_original(self, attn, attn.qkv, attn.softmax, attn.attn_drop)
        ):
            return super()._attn(x)
        return attn.proj_drop(attn.proj(self._attend(attn.qkv(x))))

    def _attend(self, qkv: Tensor) -> Tensor:
        attn = self.attn
        return _window.attend(
            qkv,
            attn.relative_position_bias_table,
            attn.qkv.bias,
            attn.num_heads,
            tuple(self.window_size),
            tuple(self.shift_size),
            attn.scale,
            pad_first=False,
        )


def _unfit(block: nn.Module) -> str | None:
    attn = block.attn
    if not plain_linear(attn.qkv):
        return f"its qkv projection is a {type(attn.qkv).__qualname__}, not a plain Linear"
    if not _window.table_fits(held(attn, "relative_position_bias_table"), block.window_size, attn.num_heads):
        return "its relative position bias table is not that of Swin v1 for its window"
    if not own_index(attn, tuple(block.window_size)):
        return "its relative position index is not that of Swin v1"
    # PyTorch's own attention, which the switch calls, does not read the scale.
    if attn.fused_attn and attn.scale != _window.standard_scale(attn.qkv, attn.num_heads):
        return _window.OTHER_SCALE
    if not attn.fused_attn and attn.softmax.dim not in (-1, 3):
        return _window.OTHER_SOFTMAX
    if not _own_mask(block):
        return "its mask is not that of its shift"
    return None


def _own_mask(block: nn.Module) -> bool:
    """Whether the mask that a block keeps is the one it would make now; older versions of timm do not say how."""
    make = getattr(block, "get_attn_mask", None)
    if getattr(block, "dynamic_mask", False) or make is None:
        return True
    mask = held(block, "attn_mask")
    if mask is None or not any(block.shift_size):
        return mask is None and not any(block.shift_size)
    key = (tuple(block.window_size), tuple(block.shift_size), tuple(block.input_resolution), mask.dtype)
    return as_made(block, "attn_mask", key, lambda: make(device=torch.device("cpu"), dtype=mask.dtype))


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
            "attn.fused_attn",
            "attn.softmax",
            "attn.attn_drop.p",
            "attn.proj",
            "attn.proj_drop",
        ),
        bypassed={
            "attn": "timm.models.swin_transformer.WindowAttention",
            "attn.softmax": "torch.nn.modules.activation.Softmax",
            "attn.attn_drop": "torch.nn.modules.dropout.Dropout",
        },
        unfit=_unfit,
        note=lambda block: _window.dropout_note(block.attn.attn_drop.p),
    ),
)

LEFT_ALONE = {
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _window.COSINE,
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": _window.COSINE,
}
