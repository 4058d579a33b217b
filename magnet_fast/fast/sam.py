"""Blocks of SAM's image encoder and of those made after it: windows and whole maps on the unpadded map.

transformers' SAM, SAM-HQ, GOT-OCR2, DeepSeek-OCR2, Unlimited-OCR, PP-FormulaNet, SLANeXt, ViTDet and SegGPT, timm's
vision_transformer_sam, segment_anything (and what is built of its blocks, as cellpose), segment_anything_hq, and copies
of segment_anything's block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from magnet_fast.fast import _block, _relative
from magnet_fast.fast._replacement import Replacement, class_path, must_run_original, names, parts_changed, path_of
from magnet_fast.fast._window import dropout_note
from magnet_fast.ops._linear import linear, plain_linear


class _Layout(NamedTuple):
    """What a library calls the parts of a block."""

    norm1: str
    attention: str
    heads: str
    norm2: str
    expand: str
    reduce: str
    after1: tuple[str, ...] = ()
    """Modules behind the attention's projection, before the sum."""
    after2: tuple[str, ...] = ()
    """Modules behind the MLP."""


class _Block:
    """A block whose window partition and attention are one operator; in inference on a CPU, the block as a whole."""

    _layout: ClassVar[_Layout]
    _whole: ClassVar[dict[str, tuple[str, ...]]]

    def _fused(self, x: Tensor) -> Tensor | None:
        """(B, H, W, C) to the same; None where the original has to run."""
        layout = self._layout
        attention = getattr(self, layout.attention)
        if parts_changed(self) or not plain_linear(attention.qkv) or _drops(attention):
            return None
        bypassed = (self.get_submodule(".".join(path)) for path, _ in type(self)._bypassed)
        if must_run_original(self, attention.qkv, *bypassed):
            return None
        norm1, norm2 = getattr(self, layout.norm1), getattr(self, layout.norm2)
        if _block.runs_whole(self, x, self._whole):

            def attend(x: Tensor) -> Tensor:
                qkv = linear(norm1(x), attention.qkv.weight, attention.qkv.bias)
                return _attend(attention, qkv, layout.heads, self.window_size)

            expand, reduce = self.get_submodule(layout.expand), self.get_submodule(layout.reduce)
            return _block.forward(x, attend, attention.proj, norm2, expand, reduce)
        attended = attention.proj(_attend(attention, attention.qkv(norm1(x)), layout.heads, self.window_size))
        x = x + _through(self, layout.after1, attended)
        return x + _through(self, layout.after2, self.mlp(norm2(x)))


def _attend(attention: nn.Module, qkv: Tensor, heads: str, window: int) -> Tensor:
    return _relative.attend(
        qkv,
        attention.rel_pos_h,
        attention.rel_pos_w,
        attention.qkv.bias,
        getattr(attention, heads),
        window,
        attention.scale,
    )


def _through(block: nn.Module, path: tuple[str, ...], x: Tensor) -> Tensor:
    for name in path:
        x = block.get_submodule(name)(x)
    return x


def _dropout(attention: nn.Module) -> float:
    """Of the attention weights; these libraries keep it in one place or the other, most have none."""
    module = getattr(attention, "attn_drop", None)
    return getattr(attention, "dropout", 0.0) if module is None else module.p


def _drops(attention: nn.Module) -> bool:
    return attention.training and _dropout(attention) > 0


class _TransformersLayer(_Block):
    """A layer of transformers' SAM on the fused operator."""

    _layout = _Layout("layer_norm1", "attn", "num_attention_heads", "layer_norm2", "mlp.lin1", "mlp.lin2")

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self._fused(hidden_states)
        return super().forward(hidden_states) if found is None else found


class _VitDetLayer(_Block):
    """A layer of transformers' ViTDet, whose maps lie channels first, on the fused operator."""

    _layout = _Layout("norm1", "attention", "num_heads", "norm2", "mlp.fc1", "mlp.fc2", ("drop_path",), ("drop_path",))

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        found = None if output_attentions else self._fused(hidden_states.permute(0, 2, 3, 1))
        if found is None:
            return super().forward(hidden_states, output_attentions)
        found = found.permute(0, 3, 1, 2)
        return (self.residual(found) if self.use_residual_block else found,)


class _SegGptAttention:
    """transformers' SegGPT attention, over two images one above the other, on the fused operator."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if output_attentions or must_run_original(self, self.qkv) or not plain_linear(self.qkv):
            return super().forward(hidden_states, output_attentions)
        return self.proj(_attend(self, self.qkv(hidden_states), "num_attention_heads", 0)), None


class _ImageAttention:
    """The attention of segment_anything's block alone, over what it is given, on the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        if must_run_original(self, self.qkv) or not plain_linear(self.qkv):
            return super().forward(x)
        return self.proj(_attend(self, self.qkv(x), "num_heads", 0))


class _ImageBlock(_Block):
    """A block of segment_anything on the fused operator."""

    _layout = _Layout("norm1", "attn", "num_heads", "norm2", "mlp.lin1", "mlp.lin2")

    def forward(self, x: Tensor) -> Tensor:
        found = self._fused(x)
        return super().forward(x) if found is None else found


class _TimmBlock(_Block):
    """A block of timm's vision_transformer_sam on the fused operator."""

    _layout = _Layout(
        "norm1",
        "attn",
        "num_heads",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
        ("attn.proj_drop", "ls1", "drop_path1"),
        ("ls2", "drop_path2"),
    )

    def forward(self, x: Tensor) -> Tensor:
        found = self._fused(x)
        return super().forward(x) if found is None else found


def _unfit(layout: _Layout, tables: str) -> Callable[[nn.Module], str | None]:
    def why(block: nn.Module) -> str | None:
        attention = getattr(block, layout.attention)
        return _unfit_attention(attention, tables, layout.heads)

    return why


def _unfit_attention(attention: nn.Module, tables: str, heads: str) -> str | None:
    if not getattr(attention, tables):
        return _relative.NO_TABLES
    return _relative.unfit(attention, getattr(attention, heads))


def _parts(
    layout: _Layout, attention: tuple[str | type, ...], mlp: str, **more: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """All modules of a block and their classes, as `_block.runs_whole` takes them; `__` in a name stands for a dot."""
    return {
        layout.norm1: _block.NORM,
        layout.attention: tuple(map(path_of, attention)),
        f"{layout.attention}.qkv": _block.LINEAR,
        f"{layout.attention}.proj": _block.LINEAR,
        layout.norm2: _block.NORM,
        "mlp": (mlp,),
        layout.expand: _block.LINEAR,
        "mlp.act": _block.GELU,
        layout.reduce: _block.LINEAR,
        **{name.replace("__", "."): classes for name, classes in more.items()},
    }


def _replacement(
    path: str,
    mixin: type[_Block],
    tables: str,
    attention: tuple[str | type, ...],
    mlp: str,
    *,
    parameters: str,
    bypassed: dict[str, str] | None = None,
    parts: dict[str, tuple[str, ...]] | None = None,
    attributes: tuple[str, ...] = (),
    name: str | None = None,
    remake: tuple[Callable[..., nn.Module], tuple] | None = None,
) -> Replacement:
    """Of one library's block; `mixin` gets a subclass that knows the classes of its parts."""
    layout = mixin._layout
    whole = _parts(layout, attention, mlp, **(parts or {}))
    own = type(mixin.__name__, (mixin,), {"_whole": whole, "__doc__": mixin.__doc__})
    inside = ("qkv", "proj", "scale", layout.heads, tables)
    return Replacement(
        path=path,
        mixin=own,
        operator="relative_attention",
        parameters={"forward": (names(parameters), names())},
        attributes=(
            "window_size",
            layout.norm1,
            layout.norm2,
            "mlp",
            *(f"{layout.attention}.{name}" for name in inside),
            *layout.after1,
            *layout.after2,
            *attributes,
        ),
        bypassed={layout.attention: attention, **(bypassed or {})},
        unfit=_unfit(layout, tables),
        note=lambda block: dropout_note(_dropout(getattr(block, layout.attention))),
        name=name,
        remake=remake,
    )


def _transformers(module: str, prefix: str, *, sdpa: bool) -> Replacement:
    path = f"transformers.models.{module}.modeling_{module}.{prefix}"
    attention = (f"{path}VisionAttention", *((f"{path}VisionSdpaAttention",) if sdpa else ()))
    return _replacement(
        f"{path}VisionLayer",
        _TransformersLayer,
        "use_rel_pos",
        attention,
        f"{path}MLPBlock",
        parameters="hidden_states",
        attributes=("attn.dropout",),
    )


def _segment_anything(package: str, name: str) -> Replacement:
    module = f"{package}.modeling"
    return _replacement(
        f"{module}.image_encoder.Block",
        _ImageBlock,
        "use_rel_pos",
        (f"{module}.image_encoder.Attention",),
        f"{module}.common.MLPBlock",
        parameters="x",
        name=name,
    )


ATTENTION_ATTRIBUTES = ("qkv", "proj", "scale", "num_heads", "use_rel_pos")
BLOCK_ATTRIBUTES = ("window_size", "norm1", "norm2", "mlp", *(f"attn.{name}" for name in ATTENTION_ATTRIBUTES))


def copied_block(cls: type, attention: type, mlp: type | None, remake: tuple) -> Replacement:
    """Of a copy of segment_anything's block; `mlp` is the class of its MLP where that is a copy as well."""
    return _replacement(
        class_path(cls),
        _ImageBlock,
        "use_rel_pos",
        (attention,),
        "" if mlp is None else class_path(mlp),
        parameters="x",
        name="BlockCopy",
        remake=remake,
    )


def copied_attention(cls: type, remake: tuple) -> Replacement:
    """Of a copy of segment_anything's attention in a block that is none, as one with an adapter."""
    return Replacement(
        path=class_path(cls),
        mixin=_ImageAttention,
        operator="relative_attention",
        parameters={"forward": (names("x"), names())},
        attributes=ATTENTION_ATTRIBUTES,
        bypassed={},
        unfit=lambda attention: _unfit_attention(attention, "use_rel_pos", "num_heads"),
        name="AttentionCopy",
        remake=remake,
    )


_TIMM = "timm.models.vision_transformer_sam"
_VITDET = "transformers.models.vitdet.modeling_vitdet"
_SEGGPT = "transformers.models.seggpt.modeling_seggpt"

REPLACEMENTS = (
    _transformers("sam", "Sam", sdpa=True),
    _transformers("sam_hq", "SamHQ", sdpa=True),
    _transformers("got_ocr2", "GotOcr2", sdpa=False),
    _transformers("deepseek_ocr2", "DeepseekOcr2Sam", sdpa=True),
    _transformers("unlimited_ocr", "UnlimitedOcrSam", sdpa=True),
    _transformers("pp_formulanet", "PPFormulaNet", sdpa=False),
    _transformers("slanext", "SLANeXt", sdpa=False),
    _replacement(
        f"{_VITDET}.VitDetLayer",
        _VitDetLayer,
        "use_relative_position_embeddings",
        (f"{_VITDET}.VitDetAttention",),
        f"{_VITDET}.VitDetMlp",
        parameters="hidden_states output_attentions",
        parts={"drop_path": (*_block.IDENTITY, f"{_VITDET}.VitDetDropPath"), "mlp__drop": _block.DROPOUT},
        attributes=("use_residual_block",),
    ),
    Replacement(
        path=f"{_SEGGPT}.SegGptAttention",
        mixin=_SegGptAttention,
        operator="relative_attention",
        parameters={"forward": (names("hidden_states output_attentions"), names())},
        attributes=("qkv", "proj", "scale", "num_attention_heads", "use_relative_position_embeddings"),
        bypassed={},
        unfit=lambda attention: _unfit_attention(attention, "use_relative_position_embeddings", "num_attention_heads"),
    ),
    _replacement(
        f"{_TIMM}.Block",
        _TimmBlock,
        "use_rel_pos",
        (f"{_TIMM}.Attention",),
        "timm.layers.mlp.Mlp",
        parameters="x",
        name="VisionTransformerSAMBlock",
        bypassed={
            "attn.q_norm": _block.IDENTITY[0],
            "attn.k_norm": _block.IDENTITY[0],
            "attn.attn_drop": _block.DROPOUT[0],
        },
        parts={
            "attn__q_norm": _block.IDENTITY,
            "attn__k_norm": _block.IDENTITY,
            "attn__attn_drop": _block.DROPOUT,
            "attn__proj_drop": _block.DROPOUT,
            "ls1": _block.IDENTITY,
            "drop_path1": (*_block.IDENTITY, "timm.layers.drop.DropPath"),
            "mlp__drop1": _block.DROPOUT,
            "mlp__norm": _block.IDENTITY,
            "mlp__drop2": _block.DROPOUT,
            "ls2": _block.IDENTITY,
            "drop_path2": (*_block.IDENTITY, "timm.layers.drop.DropPath"),
        },
    ),
    _segment_anything("segment_anything", "SegmentAnythingBlock"),
    _segment_anything("segment_anything_hq", "SegmentAnythingHQBlock"),
)

LEFT_ALONE: dict[str, str] = {}
