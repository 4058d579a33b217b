"""Copies of the Swin block that Microsoft published, in its three forms: (B, H*W, C) tokens, the map's size told apart.

For backbones the block gets its size as attributes and a mask from the stage around it; for classification both are
fixed; SwinIR hands the size over. The mask is data: whether it parts what a shift brings together, and nothing else, is
looked at in every call. OpenMMLab's own form has the windows in its attention, which makes the mask itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from magnet_fast.fast import _block, _window
from magnet_fast.fast._as_made import held, own_index
from magnet_fast.fast._replacement import Replacement, class_path, must_run_original, names, parts_changed
from magnet_fast.ops._linear import linear, plain_linear

# float32 has nothing left of a weight behind exp(-100); released code also writes minus infinity.
_HIDDEN = -100.0


class _Block:
    """A copy of Swin's block whose attention reads the map where it lies."""

    _whole: ClassVar[Mapping[str, tuple[str, ...]]]

    def _fused(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        attn = self.attn
        if _block.runs_whole(self, x, self._whole):

            def alone(x: Tensor) -> Tensor:
                return _attend(self, attn, linear(self.norm1(x), attn.qkv.weight, attn.qkv.bias), size)

            return _block.forward(x, alone, attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)
        attended = _attend(self, attn, attn.qkv(self.norm1(x)), size)
        x = x + self.drop_path(attn.proj_drop(attn.proj(attended)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _parts_only_what_a_shift_joins(self, mask: Tensor | None, size: tuple[int, int]) -> bool:
        return self.shift_size == 0 or (
            isinstance(mask, Tensor) and parts_regions(mask, size, self.window_size, self.shift_size)
        )


class _BackboneBlock(_Block):
    """A copy of the block of Swin as a backbone."""

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        size = (self.H, self.W)
        if _runs(self, self.attn, x, size) and self._parts_only_what_a_shift_joins(mask_matrix, size):
            return self._fused(x, size)
        return super().forward(x, mask_matrix)


class _FixedBlock(_Block):
    """A copy of the block of Swin for classification."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.input_resolution
        if _whole_windows(self, size) and _runs(self, self.attn, x, size) and _own_mask_fits(self, size):
            return self._fused(x, tuple(size))
        return super().forward(x)


class _SizedBlock(_Block):
    """A copy of SwinIR's block, which makes a mask anew for a map of another size than it was built for."""

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        fits = _whole_windows(self, x_size) and _runs(self, self.attn, x, x_size)
        if fits and (x_size != self.input_resolution or _own_mask_fits(self, x_size)):
            return self._fused(x, tuple(x_size))
        return super().forward(x, x_size)


class _MapAttention:
    """A copy of OpenMMLab's attention in shifted windows of a map, which makes its mask itself."""

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        attn = self.w_msa
        if not _runs(self, attn, query, hw_shape):
            return super().forward(query, hw_shape)
        attended = _attend(self, attn, attn.qkv(query), tuple(hw_shape))
        return self.drop(attn.proj_drop(attn.proj(attended)))


def _runs(module: nn.Module, attn: nn.Module, x: Tensor, size: Any) -> bool:
    """Whether the fused way stands for this call, but for the mask."""
    if parts_changed(module) or not _is_size(size) or x.dim() != 3 or x.shape[1] != size[0] * size[1]:
        return False
    if attn.attn_drop.p > 0 and attn.attn_drop.training:
        return False
    watched = (attn, attn.qkv, attn.softmax, attn.attn_drop)
    return not must_run_original(module, *watched)


def _attend(module: nn.Module, attn: nn.Module, qkv: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H*W, 3*C) to (B, H*W, C)."""
    attended = _window.attend(
        qkv.unflatten(1, size),
        attn.relative_position_bias_table,
        attn.qkv.bias,
        attn.num_heads,
        (module.window_size, module.window_size),
        (module.shift_size, module.shift_size),
        attn.scale,
        pad_first=True,
    )
    return attended.flatten(1, 2)


def _whole_windows(block: nn.Module, size: Any) -> bool:
    """These two do not pad."""
    window = block.window_size
    return (
        _is_size(size)
        and size[0] % window == size[1] % window == 0
        and not getattr(block, "fused_window_process", False)
    )


def _own_mask_fits(block: nn.Module, size: tuple[int, int]) -> bool:
    mask = block.attn_mask
    return mask is None if block.shift_size == 0 else block._parts_only_what_a_shift_joins(mask, tuple(size))


def _is_size(size: Any) -> bool:
    return isinstance(size, (tuple, list, torch.Size)) and len(size) == 2 and all(type(side) is int for side in size)


def parts_regions(mask: Tensor, size: tuple[int, int], window: int, shift: int) -> bool:
    """Whether a mask (windows, N, N) hides from a token what the shift put beside it, all of it and nothing else.

    Its values are read, which a graph that is being taken cannot do, and a tensor without any: there the answer is no.
    """
    if mask.requires_grad or mask.is_meta or torch.compiler.is_compiling():
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    apart = _apart(size, window, shift, mask.device)
    return mask.shape == apart.shape and torch.equal(mask <= _HIDDEN, apart) and torch.equal(mask == 0, ~apart)


@lru_cache(maxsize=4)
def _apart(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, N, N), True where two tokens of a window come from parts of the map that were not neighbours."""
    sides = [-(-side // window) * window for side in size]
    rows, columns = (
        torch.bucketize(
            torch.arange(side, device=device), torch.tensor([side - window, side - shift], device=device), right=True
        )
        for side in sides
    )
    regions = 3 * rows[:, None] + columns
    regions = regions.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
    return regions[:, :, None] != regions[:, None, :]


_FORMS = {
    "swin backbone block": (_BackboneBlock, "x mask_matrix", ("H", "W")),
    "swin block": (_FixedBlock, "x", ("input_resolution", "attn_mask")),
    "swinir block": (_SizedBlock, "x x_size", ("input_resolution", "attn_mask")),
}
KINDS = tuple(_FORMS)
_SIDES = ("window_size", "shift_size")
_OF_ATTENTION = (
    "qkv",
    "relative_position_bias_table",
    "relative_position_index",
    "window_size",
    "num_heads",
    "scale",
    "softmax.dim",
    "attn_drop.p",
    "proj",
    "proj_drop",
)
MAP_ATTRIBUTES = (*_SIDES, "drop", *(f"w_msa.{name}" for name in _OF_ATTENTION))


def attributes(kind: str) -> tuple[str, ...]:
    """Of a block in one of the forms in `KINDS`."""
    of_attention = (f"attn.{name}" for name in _OF_ATTENTION)
    return (*_SIDES, "norm1", "norm2", "drop_path", "mlp", *of_attention, *_FORMS[kind][2])


def copied_block(kind: str, cls: type, attention: type, mlp: type | None, remake: tuple) -> Replacement:
    """Of a copy in one of the forms in `KINDS`; `mlp` is the class of its MLP where that is a copy as well."""
    form, parameters, _ = _FORMS[kind]
    own = type(form.__name__, (form,), {"_whole": _parts(attention, mlp), "__doc__": form.__doc__})
    return _replacement(cls, own, "attn", attention, parameters, attributes(kind), remake)


def copied_map_attention(cls: type, attention: type, remake: tuple) -> Replacement:
    """Of a copy of OpenMMLab's attention in shifted windows."""
    return _replacement(cls, _MapAttention, "w_msa", attention, "query hw_shape", MAP_ATTRIBUTES, remake)


def _replacement(
    cls: type,
    mixin: type,
    name: str,
    attention: type,
    parameters: str,
    attributes: tuple[str, ...],
    remake: tuple,
) -> Replacement:
    return Replacement(
        path=class_path(cls),
        mixin=mixin,
        operator="window_attention",
        parameters={"forward": (names(parameters), names())},
        attributes=attributes,
        bypassed={
            name: attention,
            f"{name}.softmax": "torch.nn.modules.activation.Softmax",
            f"{name}.attn_drop": _block.DROPOUT,
        },
        unfit=lambda module: _unfit(module, getattr(module, name)),
        note=lambda module: _window.dropout_note(getattr(module, name).attn_drop.p),
        name=f"{mixin.__name__.lstrip('_')}Copy",
        remake=remake,
    )


def _parts(attention: type, mlp: type | None) -> dict[str, tuple[str, ...]]:
    return {
        "norm1": _block.NORM,
        "attn": (class_path(attention),),
        "attn.qkv": _block.LINEAR,
        "attn.attn_drop": _block.DROPOUT,
        "attn.proj": _block.LINEAR,
        "attn.proj_drop": _block.DROPOUT,
        "attn.softmax": ("torch.nn.modules.activation.Softmax",),
        "drop_path": (*_block.IDENTITY, "timm.layers.drop.DropPath"),
        "norm2": _block.NORM,
        "mlp": () if mlp is None else (class_path(mlp),),
        "mlp.fc1": _block.LINEAR,
        "mlp.act": _block.GELU,
        "mlp.fc2": _block.LINEAR,
        "mlp.drop": _block.DROPOUT,
    }


def _unfit(module: nn.Module, attn: nn.Module) -> str | None:
    """Everything that `__init__` made and the fused way takes for granted."""
    window, shift = module.window_size, module.shift_size
    if type(window) is not int or type(shift) is not int or not 0 <= shift < window:
        return f"its window and shift are {window!r} and {shift!r}, not a side in tokens and a shift below it"
    if tuple(attn.window_size) != (window, window):
        return f"its attention has windows of {tuple(attn.window_size)}, not of {window}"
    if not plain_linear(attn.qkv):
        return f"its qkv projection is a {type(attn.qkv).__qualname__}, not a plain Linear"
    if attn.qkv.out_features != 3 * attn.qkv.in_features or attn.qkv.in_features % attn.num_heads:
        return "its qkv projection does not make queries, keys and values of its input's width"
    if not _window.table_fits(held(attn, "relative_position_bias_table"), (window, window), attn.num_heads):
        return "its relative position bias table is not that of Swin v1 for its window"
    if not own_index(attn, (window, window)):
        return "its relative position index is not that of Swin v1"
    if attn.scale != _window.standard_scale(attn.qkv, attn.num_heads):
        return _window.OTHER_SCALE
    if attn.softmax.dim not in (-1, 3):
        return _window.OTHER_SOFTMAX
    return None
