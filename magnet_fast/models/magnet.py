"""MagNet: image stages and text slices that exchange, and a one-query mask decoder (Chng et al., CVPR 2024)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.released import BERT, SWIN, Released, bert_sizes, count, pwam_rules, rules, shape, swin_sizes
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN

_CROSS = r"transformer_cross_attention_layers\.(\d+)"
_SELF = r"transformer_self_attention_layers\.(\d+)"
_RULES = [
    *rules(
        r"image_model\.",
        [
            *SWIN,
            *pwam_rules(r"layers\.(\d+)\.fusion", r"fusion.stages.\1.fusion"),
            *pwam_rules(r"layers\.(\d+)\.fusions\.(\d+)", r"fusion.stages.\1.level_fusions.\2"),
            (r"layers\.(\d+)\.res_gate\.0\.(.*)", r"fusion.stages.\1.image_gate.first.\2"),
            (r"layers\.(\d+)\.res_gate\.2\.(.*)", r"fusion.stages.\1.image_gate.last.\2"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.1\.(.*)", r"fusion.stages.\1.pools.\2.expand.\3"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.2\.(.*)", r"fusion.stages.\1.pools.\2.norm.\3"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.3\.(.*)", r"fusion.stages.\1.pools.\2.contract.\3"),
            (r"layers\.(\d+)\.pyramids\.(\d+)\.5\.(.*)", r"fusion.stages.\1.pools.\2.reduce.\3"),
            (r"layers\.(\d+)\.mixer\.(.*)", r"fusion.stages.\1.mixer.\2"),
        ],
    ),
    *rules(
        r"language_model\.",
        [
            *BERT,
            *pwam_rules(r"pwams\.(\d+)", r"fusion.stages.\1.text_fusion"),
            (r"res_gates\.(\d+)\.0\.(.*)", r"fusion.stages.\1.text_gate.first.\2"),
            (r"res_gates\.(\d+)\.2\.(.*)", r"fusion.stages.\1.text_gate.last.\2"),
        ],
    ),
    *rules(
        r"classifier\.pixel_decoder\.",
        [
            (r"input_proj\.(\d+)\.0\.(.*)", r"head.pixel_decoder.input_proj.\1.\2"),
            (r"input_proj\.(\d+)\.1\.(.*)", r"head.pixel_decoder.input_norm.\1.\2"),
            (r"transformer\.level_embed", r"head.pixel_decoder.level_embed"),
            (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.*)", r"head.pixel_decoder.layers.\1.attention.\2"),
            (r"transformer\.encoder\.layers\.(\d+)\.(.*)", r"head.pixel_decoder.layers.\1.\2"),
            (r"mask_features\.(.*)", r"head.pixel_decoder.mask_features.\1"),
        ],
    ),
    *rules(
        r"classifier\.predictor\.",
        [
            (rf"{_CROSS}\.multihead_attn\.(in_proj_.*)", r"head.mask_decoder.layers.\1.cross_attention.\2"),
            (rf"{_CROSS}\.multihead_attn\.out_proj\.(.*)", r"head.mask_decoder.layers.\1.cross_attention.output.\2"),
            (rf"{_CROSS}\.norm\.(.*)", r"head.mask_decoder.layers.\1.cross_attention.norm.\2"),
            (rf"{_SELF}\.self_attn\.(in_proj_.*)", r"head.mask_decoder.layers.\1.self_attention.\2"),
            (rf"{_SELF}\.self_attn\.out_proj\.(.*)", r"head.mask_decoder.layers.\1.self_attention.output.\2"),
            (rf"{_SELF}\.norm\.(.*)", r"head.mask_decoder.layers.\1.self_attention.norm.\2"),
            (r"transformer_ffn_layers\.(\d+)\.(.*)", r"head.mask_decoder.layers.\1.\2"),
            (r"decoder_norm\.(.*)", r"head.mask_decoder.norm.\1"),
            (r"query_feat\.weight", r"head.mask_decoder.query_feature"),
            (r"(query_embed|level_embed)\.weight", r"head.mask_decoder.\1"),
            (r"class_embed\.(.*)", r"head.mask_decoder.class_head.\1"),
            (r"mask_embed\.layers\.0\.(.*)", r"head.mask_decoder.mask_head.0.\1"),
            (r"mask_embed\.layers\.1\.(.*)", r"head.mask_decoder.mask_head.2.\1"),
            (r"mask_embed\.layers\.2\.(.*)", r"head.mask_decoder.mask_head.4.\1"),
        ],
    ),
]


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    pixel, mask = "classifier.pixel_decoder.transformer.encoder.layers", "classifier.predictor.transformer"
    width = shape(state, "classifier.pixel_decoder.mask_features.weight")[0]
    heads = max(1, width // 32)  # Mask2Former: 8 heads of 32
    samples = shape(state, f"{pixel}.0.self_attn.attention_weights.bias")[0]
    return {
        "image": swin_sizes(state, "image_model."),
        "text": {**bert_sizes(state, "language_model."), "schedule": "slices"},
        "fusion": {
            "kind": "exchange",
            "masking": hints.get("masking", "released"),
            "heads": hints.get("fusion_heads", 1),
        },
        "head": {
            "kind": "mask2former",
            "width": width,
            "num_heads": heads,
            "points": samples // (4 * heads),
            "pixel_layers": count(state, rf"{re.escape(pixel)}\.(\d+)\."),
            "pixel_feedforward": shape(state, f"{pixel}.0.linear1.weight")[0],
            "mask_layers": count(state, rf"{re.escape(mask)}_ffn_layers\.(\d+)\."),
            "mask_feedforward": shape(state, f"{mask}_ffn_layers.0.linear1.weight")[0],
        },
    }


_RELEASED = Released(
    mark="image_model.",
    config=_config,
    rules=_RULES,
    # Derived indices; norms whose results are thrown away; the last stage's gate, whose stream nothing reads; the
    # sentence's projection, which only the alignment loss reads: that term has its own.
    dropped=re.compile(
        r".*\.relative_position_index|.*\.embeddings\.position_ids|language_model\.pooler\..*"
        r"|image_model\.norm\d\..*|language_model\.norms\.\d\..*|image_model\.layers\.3\.res_gate\..*|lang_proj\..*"
    ),
    hints=("fusion_heads", "masking"),
)


def _parts(swin: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": swin,
        "text": {"kind": "bert", "schedule": "slices"},
        "fusion": {"kind": "exchange"},
        "head": {"kind": "mask2former"},
    }


_TINY = {
    "image": TINY_SWIN,
    "text": {**TINY_BERT, "schedule": "slices"},
    "fusion": {"kind": "exchange"},
    "head": {
        "kind": "mask2former",
        "width": 64,
        "num_heads": 4,
        "points": 2,
        "pixel_layers": 1,
        "pixel_feedforward": 128,
        "mask_feedforward": 128,
    },
}


@register(
    "magnet",
    presets={"magnet_tiny": _TINY, **{f"magnet_{size}": _parts(swin) for size, swin in SWIN_SIZES.items()}},
    released=_RELEASED,
)
class MagNet(ReferringModel):
    """The released architecture (`fusion__form="pwam"`) or the paper's (`"xmha"`).

    Masks have ⌈H/4⌉×⌈W/4⌉; there are as many earlier predictions as the mask decoder has layers.
    """

    config: ModelConfig
