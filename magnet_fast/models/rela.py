"""ReLA: LAVT's encoder and a grid of regions, for sentences that name none, one or several objects.

Liu, Ding, Jiang, "GRES: Generalized Referring Expression Segmentation", CVPR 2023.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.released import BERT, LAVT_STAGES, SWIN, Released, bert_sizes, count, rules, shape, swin_sizes
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN

_RULES = [
    *rules(r"backbone\.", [*SWIN, *LAVT_STAGES]),
    *rules(r"text_encoder\.", BERT),
    *rules(
        r"sem_seg_head\.pixel_decoder\.",
        [
            (r"input_proj\.(\d+)\.0\.(.*)", r"head.pixel_decoder.input_proj.\1.\2"),
            (r"input_proj\.(\d+)\.1\.(.*)", r"head.pixel_decoder.input_norm.\1.\2"),
            (r"transformer\.level_embed", r"head.pixel_decoder.level_embed"),
            (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.*)", r"head.pixel_decoder.layers.\1.attention.\2"),
            (r"transformer\.encoder\.layers\.(\d+)\.(.*)", r"head.pixel_decoder.layers.\1.\2"),
            (r"adapter_1\.norm\.(.*)", r"head.pixel_decoder.lateral_norm.\1"),
            (r"adapter_1\.(.*)", r"head.pixel_decoder.lateral.\1"),
            (r"layer_1\.norm\.(.*)", r"head.pixel_decoder.smooth_norm.\1"),
            (r"layer_1\.(.*)", r"head.pixel_decoder.smooth.\1"),
            (r"mask_features\.(.*)", r"head.pixel_decoder.mask_features.\1"),
        ],
    ),
    *rules(
        r"sem_seg_head\.predictor\.",
        [
            (r"RIA_layers\.(\d+)\.multihead_attn\.out_proj\.(.*)", r"head.decoder.pixel_attention.\1.output.\2"),
            (r"RIA_layers\.(\d+)\.multihead_attn\.(in_proj_.*)", r"head.decoder.pixel_attention.\1.\2"),
            (r"RIA_layers\.(\d+)\.norm\.(.*)", r"head.decoder.pixel_attention.\1.norm.\2"),
            (r"RLA_vision\.(\d+)\.self_attn\.out_proj\.(.*)", r"head.decoder.layers.\1.attention.output.\2"),
            (r"RLA_vision\.(\d+)\.self_attn\.(in_proj_.*)", r"head.decoder.layers.\1.attention.\2"),
            (r"RLA_vision\.(\d+)\.norm\.(.*)", r"head.decoder.layers.\1.attention.norm.\2"),
            (r"RLA_lang_att\.multihead_attn\.out_proj\.(.*)", r"head.decoder.word_attention.output.\1"),
            (r"RLA_lang_att\.multihead_attn\.(in_proj_.*)", r"head.decoder.word_attention.\1"),
            (r"RLA_lang_att\.norm\.(.*)", r"head.decoder.word_attention.norm.\1"),
            (r"transformer_ffn_layers\.(\d+)\.(.*)", r"head.decoder.layers.\1.\2"),
            (r"lang_proj\.(.*)", r"head.decoder.word_in.\1"),
            (r"lang_weight", r"head.decoder.language_gate"),
            (r"query_feat\.weight", r"head.decoder.query_feature"),
            (r"(query_embed|level_embed)\.weight", r"head.decoder.\1"),
            (r"decoder_norm\.(.*)", r"head.decoder.norm.\1"),
            (r"minimap_embed\.(.*)", r"head.decoder.minimap_head.\1"),
            (r"nt_embed\.layers\.0\.(.*)", r"head.decoder.presence_head.0.\1"),
            (r"nt_embed\.layers\.1\.(.*)", r"head.decoder.presence_head.2.\1"),
            (r"mask_embed\.layers\.0\.(.*)", r"head.decoder.mask_head.0.\1"),
            (r"mask_embed\.layers\.1\.(.*)", r"head.decoder.mask_head.2.\1"),
            (r"mask_embed\.layers\.2\.(.*)", r"head.decoder.mask_head.4.\1"),
        ],
    ),
]


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    pixel, regions = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    other = [name for name in state if "RLA_gate" in name or "RIA_cross_attention" in name]
    if other:
        raise ValueError(
            f"the checkpoint holds {other[0]!r}: it is of ReLA's branch 'original', which is another model; expected "
            "one of branch 'main'"
        )
    heads = hints.get("decoder_heads", 8)
    layer = f"{pixel}transformer.encoder.layers.0."
    levels = shape(state, f"{pixel}transformer.level_embed")[0]
    return {
        "image": swin_sizes(state, "backbone."),
        "text": bert_sizes(state, "text_encoder."),
        "fusion": {"kind": "pwam", "heads": hints.get("fusion_heads", 1)},
        "head": {
            "kind": "regions",
            "side": math.isqrt(shape(state, f"{regions}query_feat.weight")[0]),
            "width": shape(state, f"{pixel}mask_features.weight")[0],
            "num_heads": heads,
            "points": shape(state, f"{layer}self_attn.attention_weights.bias")[0] // (levels * heads),
            "pixel_layers": count(state, re.escape(pixel) + r"transformer\.encoder\.layers\.(\d+)\."),
            "pixel_feedforward": shape(state, f"{layer}linear1.weight")[0],
            "layers": count(state, re.escape(regions) + r"transformer_ffn_layers\.(\d+)\."),
            "feedforward": shape(state, f"{regions}transformer_ffn_layers.0.linear1.weight")[0],
            "language_gate": hints.get("language_gate", "released"),
        },
    }


def _unread(hints: Mapping[str, Any]) -> re.Pattern[str]:
    # Derived indices; BERT's pooler; the last stage's gate; and the gate of the words, which released code never loads.
    gate = "" if hints.get("language_gate", "released") == "trained" else r"|sem_seg_head\.predictor\.lang_weight"
    return re.compile(
        r".*\.relative_position_index|.*\.embeddings\.position_ids|text_encoder\.pooler\..*"
        r"|backbone\.layers\.3\.res_gate\..*" + gate
    )


_RELEASED = Released(
    mark="sem_seg_head.",
    config=_config,
    rules=_RULES,
    dropped=lambda state, hints: _unread(hints),
    hints=("fusion_heads", "decoder_heads", "language_gate"),
)


def _parts(image: dict[str, Any]) -> dict[str, Any]:
    return {"image": image, "text": {"kind": "bert"}, "fusion": {"kind": "pwam"}, "head": {"kind": "regions"}}


_TINY_HEAD = {
    "kind": "regions",
    "side": 6,
    "width": 64,
    "num_heads": 4,
    "points": 2,
    "pixel_layers": 1,
    "pixel_feedforward": 128,
    "layers": 3,
    "feedforward": 128,
}


@register(
    "rela",
    presets={
        "rela_tiny": {**_parts(TINY_SWIN), "text": TINY_BERT, "head": _TINY_HEAD},
        **{f"rela_{size}": _parts(SWIN_SIZES[size]) for size in ("swin_b", "swin_t")},
    },
    released=_RELEASED,
)
class ReLA(ReferringModel):
    """BERT first, then Swin with a PWAM after each stage, then regions; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
