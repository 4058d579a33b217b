"""CRIS: CLIP's encoders, a neck, pixels that read words, and a kernel made of the sentence (Wang et al., CVPR 2022).

Its authors never published weights; files in the layout of their code are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.encoders.clip_resnet import clip_image_names
from magnet_fast.models.encoders.clip_text import clip_text_names
from magnet_fast.models.registry import register
from magnet_fast.models.released import Released, count, rules, shape

_NECK = {
    r"txt_proj": "sentence",
    r"f1_v_proj": "coarse",
    r"f2_v_proj": "middle",
    r"f2_cat": "middle_join",
    r"f3_v_proj": "fine",
    r"f3_cat": "fine_join",
    r"f4_proj5": "coarse_out",
    r"f4_proj4": "middle_out",
    r"f4_proj3": "fine_out",
    r"aggr": "join",
    r"coordconv\.0\.conv1": "place",
    r"coordconv\.1": "last",
}
_LAYER = r"layers\.(\d+)"
_RULES = [
    *rules("", [(old, f"image_encoder.{new}") for old, new in clip_image_names(r"backbone\.visual\.")]),
    *rules("", [(old, f"text_encoder.{new}") for old, new in clip_text_names(r"backbone\.")]),
    *rules(
        r"neck\.",
        [
            *((rf"{old}\.(.*)", rf"fusion.neck.{new}.\1") for old, new in _NECK.items()),
            (r"norm_layer\.0\.(.*)", r"fusion.neck.coarse_norm.\1"),
        ],
    ),
    *rules(
        r"decoder\.",
        [
            (rf"{_LAYER}\.self_attn\.(in_proj_.*)", r"head.layers.\1.self_attention.\2"),
            (rf"{_LAYER}\.self_attn\.out_proj\.(.*)", r"head.layers.\1.self_attention.output.\2"),
            (rf"{_LAYER}\.multihead_attn\.(in_proj_.*)", r"head.layers.\1.word_attention.\2"),
            (rf"{_LAYER}\.multihead_attn\.out_proj\.(.*)", r"head.layers.\1.word_attention.output.\2"),
            (rf"{_LAYER}\.self_attn_norm\.(.*)", r"head.layers.\1.self_norm.\2"),
            (rf"{_LAYER}\.cross_attn_norm\.(.*)", r"head.layers.\1.word_norm.\2"),
            (rf"{_LAYER}\.ffn\.(.*)", r"head.layers.\1.feedforward.\2"),
            (rf"{_LAYER}\.(norm\d\..*)", r"head.layers.\1.\2"),
            (r"norm\.(.*)", r"head.norm.\1"),
        ],
    ),
    *rules(
        r"proj\.",
        [
            (r"vis\.1\.(.*)", r"head.projector.enlarge1.\1"),
            (r"vis\.3\.(.*)", r"head.projector.enlarge2.\1"),
            (r"vis\.4\.(.*)", r"head.projector.pixels.\1"),
            (r"txt\.(.*)", r"head.projector.kernel.\1"),
        ],
    ),
]


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    visual, text = "backbone.visual.", "backbone."
    positions, projection = shape(state, f"{text}positional_embedding"), shape(state, f"{text}text_projection")
    return {
        "image": {
            "kind": "clip_resnet",
            "stem": shape(state, f"{visual}conv3.weight")[0],
            "blocks": tuple(count(state, rf"backbone\.visual\.layer{layer}\.(\d+)\.") for layer in (1, 2, 3, 4)),
            "joint_width": shape(state, f"{visual}attnpool.c_proj.weight")[0],
            "table_side": math.isqrt(shape(state, f"{visual}attnpool.positional_embedding")[0] - 1),
        },
        "text": {
            "kind": "clip_text",
            "vocab_size": shape(state, f"{text}token_embedding.weight")[0],
            "hidden_size": positions[1],
            "num_layers": count(state, r"backbone\.transformer\.resblocks\.(\d+)\."),
            "max_positions": positions[0],
            "joint_width": projection[1],
        },
        "fusion": {
            "kind": "neck",
            "widths": tuple(
                shape(state, f"neck.{name}.0.weight")[0] for name in ("f3_v_proj", "f2_v_proj", "f1_v_proj")
            ),
        },
        "head": {
            "kind": "text_kernel",
            "layers": count(state, r"decoder\.layers\.(\d+)\."),
            "num_heads": hints.get("decoder_heads", 8),
            "feedforward": shape(state, "decoder.layers.0.ffn.0.weight")[0],
        },
        "input": {**_INPUT, "max_tokens": hints.get("max_tokens", _INPUT["max_tokens"])},
    }


_INPUT = {"size": 416, "fit": "letterbox", "max_tokens": 17, "threshold": 0.35}

_RELEASED = Released(
    mark="backbone.visual.",
    config=_config,
    rules=_RULES,
    dropped=re.compile(r"backbone\.logit_scale"),  # of CLIP's training
    hints=("decoder_heads", "max_tokens"),
)


def _parts(image: dict[str, Any], joint_width: int) -> dict[str, Any]:
    return {
        "image": {"kind": "clip_resnet", "joint_width": joint_width, **image},
        "text": {"kind": "clip_text", "joint_width": joint_width},
        "fusion": {"kind": "neck"},
        "head": {"kind": "text_kernel"},
        "input": _INPUT,
    }


_TINY = {
    "image": {"kind": "clip_resnet", "stem": 16, "blocks": (1, 1, 1, 1), "joint_width": 64, "table_side": 4},
    "text": {
        "kind": "clip_text",
        "vocab_size": 1280,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_positions": 64,
        "joint_width": 64,
    },
    "fusion": {"kind": "neck", "widths": (32, 64, 128)},
    "head": {"kind": "text_kernel", "layers": 2, "num_heads": 4, "feedforward": 128, "dropout": 0.0},
    "input": {**_INPUT, "size": 128, "max_tokens": 20, "tokenizer": "wordpiece"},  # CLIP's vocabulary does not ship
}


@register(
    "cris",
    presets={
        "cris_tiny": _TINY,
        "cris_r50": _parts({"blocks": (3, 4, 6, 3)}, 1024),
        "cris_r101": _parts({"blocks": (3, 4, 23, 3)}, 512),
    },
    released=_RELEASED,
)
class CRIS(ReferringModel):
    """CLIP's maps of strides 8, 16 and 32 joined with the sentence; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
