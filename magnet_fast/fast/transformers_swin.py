"""transformers' Swin layers: SwinLayer, and the same layer in its older form in MaskFormer, Donut and CLAP.

The padding, the shift, the partition into windows and the mask belong to the layer, not to its attention module, so
the layer is what is replaced. Its three projections are three Linears; their weights are put side by side, so that one
product writes the qkv map that the operator reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast.fast import _block, _window
from magnet_fast.fast._as_made import held, own_index
from magnet_fast.fast._replacement import Replacement, must_run_original, names, parts_changed
from magnet_fast.ops._linear import linear, plain_linear

# What their attention computes under either name; a name registered by a user may be anything.
_KNOWN_ATTENTION = ("sdpa", "eager")

_MODULE = "transformers.models.swin.modeling_swin"
_PARTS = {
    "attention": (f"{_MODULE}.SwinAttention",),
    "attention.q_proj": _block.LINEAR,
    "attention.k_proj": _block.LINEAR,
    "attention.v_proj": _block.LINEAR,
    "attention.o_proj": _block.LINEAR,
    "attention.relative_position_bias": (f"{_MODULE}.SwinRelativePositionBias",),
    "layernorm_before": _block.NORM,
    "layernorm_after": _block.NORM,
    "mlp": (f"{_MODULE}.SwinMLP",),
    "mlp.activation_fn": _block.GELU,
    "mlp.fc1": _block.LINEAR,
    "mlp.fc2": _block.LINEAR,
    "dropout": _block.DROPOUT,
    "drop_path": (*_block.IDENTITY, f"{_MODULE}.SwinDropPath"),
}


class _SwinLayer:
    """transformers' SwinLayer on the fused operator. Attention weights, where asked for, come from the original."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if parts_changed(self):
            return super().forward(hidden_states, input_dimensions, always_partition=always_partition, **kwargs)
        attention = self.attention
        bias = attention.relative_position_bias
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        if (
            (self.training and attention.attention_dropout > 0)
            or must_run_original(self, attention, bias, *projections)
            or not plain_linear(*projections)
            or kwargs.get("output_attentions", attention.config.output_attentions)
            or attention.config._attn_implementation not in _KNOWN_ATTENTION
            or _other_window(self, input_dimensions, always_partition, (bias.window_size[0],))
        ):
            return super().forward(hidden_states, input_dimensions, always_partition=always_partition, **kwargs)

        def attend(hidden_states: Tensor) -> Tensor:
            return _attend(
                self.layernorm_before(hidden_states),
                input_dimensions,
                projections,
                bias.relative_position_bias_table,
                attention.num_attention_heads,
                self.window_size,
                self.shift_size,
                attention.scaling,
            )

        if _block.runs_whole(self, hidden_states, _PARTS):
            mlp = self.mlp
            parts = (attention.o_proj, self.layernorm_after, mlp.fc1, mlp.fc2)
            return _block.forward(hidden_states, attend, *parts), None
        hidden_states = hidden_states + self.drop_path(self.dropout(attention.o_proj(attend(hidden_states))))
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), None


class _MaskFormerSwinLayer:
    """The layer of MaskFormer's own Swin, which shifts whatever the size of the map."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or _older_unfit_now(self) or _other_window(self, None, True, _window_sides(self)):
            return super().forward(hidden_states, input_dimensions, output_attentions)
        return _older_forward(self, hidden_states, input_dimensions)


class _ClampedSwinLayer:
    """The layer of Donut and of CLAP's audio encoder, which does not shift a map of a single window."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
        always_partition: bool | None = False,
    ) -> tuple[Tensor, ...]:
        if (
            output_attentions
            or _older_unfit_now(self)
            or _other_window(self, input_dimensions, always_partition, _window_sides(self))
        ):
            return super().forward(hidden_states, input_dimensions, output_attentions, always_partition)
        return _older_forward(self, hidden_states, input_dimensions)


def _older_unfit_now(layer: nn.Module) -> bool:
    if parts_changed(layer):
        return True
    attention = layer.attention.self
    projections = (attention.query, attention.key, attention.value)
    return (
        (attention.dropout.training and attention.dropout.p > 0)
        or must_run_original(layer, layer.attention, attention, attention.dropout, layer.attention.output, *projections)
        or not plain_linear(*projections)
    )


def _window_sides(layer: nn.Module) -> tuple[int, ...]:
    return tuple(layer.attention.self.window_size)


def _other_window(
    layer: nn.Module, size: tuple[int, int] | None, always_partition: bool | None, sides: tuple[int, ...]
) -> bool:
    """Whether the layer's window for a map of this size is another than its attention's. Asked last: as the original
    does, it lets the layer choose its window and its shift, once a call."""
    if not always_partition:
        layer.set_shift_and_window_size(size)
    return any(side != layer.window_size for side in sides)


def _older_forward(layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int]) -> tuple[Tensor]:
    attention, output = layer.attention.self, layer.attention.output
    attended = _attend(
        layer.layernorm_before(hidden_states),
        input_dimensions,
        (attention.query, attention.key, attention.value),
        attention.relative_position_bias_table,
        attention.num_attention_heads,
        layer.window_size,
        layer.shift_size,
        attention.attention_head_size**-0.5,
    )
    hidden_states = hidden_states + layer.drop_path(output.dropout(output.dense(attended)))
    return (hidden_states + layer.output(layer.intermediate(layer.layernorm_after(hidden_states))),)


def _attend(
    x: Tensor,
    size: tuple[int, int],
    projections: tuple[nn.Linear, nn.Linear, nn.Linear],
    bias_table: Tensor,
    num_heads: int,
    window: int,
    shift: int,
    scale: float,
) -> Tensor:
    """(B, H*W, C) after the first norm to (B, H*W, C) before the output projection."""
    weight = torch.cat([projection.weight for projection in projections])
    biases = [projection.bias for projection in projections]
    bias = None if biases[0] is None else torch.cat(biases)
    qkv = linear(x, weight, bias).unflatten(1, size)
    window_size, shifts = (window, window), (shift, shift)
    return _window.attend(qkv, bias_table, bias, num_heads, window_size, shifts, scale, pad_first=True).flatten(1, 2)


def _unfit(layer: nn.Module) -> str | None:
    bias = layer.attention.relative_position_bias
    projections = (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
    return _unfit_parts(projections, bias, layer.attention.num_attention_heads, layer.attention.head_dim)


def _older_unfit(layer: nn.Module) -> str | None:
    attention = layer.attention.self
    projections = (attention.query, attention.key, attention.value)
    return _unfit_parts(projections, attention, attention.num_attention_heads, attention.attention_head_size)


def _unfit_parts(projections: tuple[nn.Module, ...], bias: nn.Module, num_heads: int, width: int) -> str | None:
    """Of the projections, the module that has the table, and the number of heads and their width."""
    if not plain_linear(*projections):
        return "its query, key and value projections are not plain Linears"
    if len({projection.bias is None for projection in projections}) > 1:
        return "some of its query, key and value projections have a bias and others none"
    if any(projection.out_features != num_heads * width for projection in projections):
        return "its query, key and value projections are not those of its heads"
    if not _window.table_fits(held(bias, "relative_position_bias_table"), bias.window_size, num_heads):
        return "its relative position bias table is not that of Swin v1 for its window"
    if not own_index(bias, tuple(bias.window_size)):
        return "its relative position index is not that of Swin v1"
    return None


def _older(path: str, mixin: type, more_parameters: str) -> Replacement:
    attention = f"transformers.models.{path.removesuffix('Layer')}"
    return Replacement(
        path=f"transformers.models.{path}",
        mixin=mixin,
        operator="window_attention",
        parameters={"forward": (names("hidden_states input_dimensions output_attentions", more_parameters), names())},
        attributes=(
            "window_size",
            "shift_size",
            "layernorm_before",
            "layernorm_after",
            "drop_path",
            "intermediate",
            "output",
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.self.relative_position_bias_table",
            "attention.self.window_size",
            "attention.self.num_attention_heads",
            "attention.self.attention_head_size",
            "attention.self.dropout.p",
            "attention.output.dense",
            "attention.output.dropout",
        ),
        bypassed={
            "attention": attention + "Attention",
            "attention.self": attention + "SelfAttention",
            "attention.self.dropout": "torch.nn.modules.dropout.Dropout",
            "attention.output": attention + "SelfOutput",
        },
        unfit=_older_unfit,
        note=lambda layer: _window.dropout_note(layer.attention.self.dropout.p),
    )


REPLACEMENTS = (
    Replacement(
        path=f"{_MODULE}.SwinLayer",
        mixin=_SwinLayer,
        operator="window_attention",
        parameters={
            "forward": (names("hidden_states input_dimensions always_partition kwargs"), names()),
            "set_shift_and_window_size": (names("input_resolution"), names()),
        },
        attributes=(
            "window_size",
            "shift_size",
            "layernorm_before",
            "layernorm_after",
            "mlp",
            "dropout",
            "drop_path",
            "attention.config._attn_implementation",
            "attention.config.output_attentions",
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.o_proj",
            "attention.scaling",
            "attention.attention_dropout",
            "attention.num_attention_heads",
            "attention.head_dim",
            "attention.relative_position_bias.window_size",
            "attention.relative_position_bias.relative_position_bias_table",
        ),
        bypassed={
            "attention": f"{_MODULE}.SwinAttention",
            "attention.relative_position_bias": f"{_MODULE}.SwinRelativePositionBias",
        },
        unfit=_unfit,
        note=lambda layer: _window.dropout_note(layer.attention.attention_dropout),
    ),
    _older("maskformer.modeling_maskformer_swin.MaskFormerSwinLayer", _MaskFormerSwinLayer, ""),
    _older("donut.modeling_donut_swin.DonutSwinLayer", _ClampedSwinLayer, "always_partition"),
    _older("clap.modeling_clap.ClapAudioLayer", _ClampedSwinLayer, "always_partition"),
)

LEFT_ALONE = {
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer": _window.COSINE,
    "transformers.models.swin2sr.modeling_swin2sr.Swin2SRLayer": _window.COSINE,
}
