"""LAVT: language-aware Swin stages and a convolutional decoder (Yang et al., CVPR 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.released import BERT, LAVT_STAGES, SWIN, Released, bert_sizes, rules, swin_sizes
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN

_RULES = [
    *rules(
        r"backbone\.",
        [
            *SWIN,
            *LAVT_STAGES,
        ],
    ),
    *rules(
        r"classifier\.",
        [
            *(
                (rf"{kind}{half}_{level}\.(.*)", rf"head.blocks.{4 - level}.{3 * (half - 1) + offset}.\1")
                for level in (4, 3, 2)
                for half in (1, 2)
                for offset, kind in enumerate(("conv", "bn"))
            ),
            (r"conv1_1\.(.*)", r"head.classify.\1"),
        ],
    ),
    *rules(r"(?:bert_model|text_encoder)\.", BERT),
]


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    inside = any(name.startswith("text_encoder.") for name in state)  # "lavt_one": BERT in the model, not beside it
    return {
        "image": swin_sizes(state, "backbone."),
        "text": bert_sizes(state, "text_encoder." if inside else "bert_model."),
        "fusion": {"kind": "pwam", "heads": hints.get("fusion_heads", 1)},
        "head": {"kind": "topdown"},
    }


_RELEASED = Released(
    mark="classifier.conv",
    config=_config,
    rules=_RULES,
    # Derived indices; BERT's pooler; the last stage's gate, whose stream nothing reads.
    dropped=re.compile(
        r".*\.relative_position_index|.*\.embeddings\.position_ids|(bert_model|text_encoder)\.pooler\..*"
        r"|backbone\.layers\.3\.res_gate\..*"
    ),
    hints=("fusion_heads",),
    beside=("bert_model",),
)


def _parts(swin: dict[str, Any], bert: dict[str, Any]) -> dict[str, Any]:
    return {"image": swin, "text": bert, "fusion": {"kind": "pwam"}, "head": {"kind": "topdown"}}


@register(
    "lavt",
    presets={
        "lavt_tiny": _parts(TINY_SWIN, TINY_BERT),
        **{f"lavt_{size}": _parts(swin, {"kind": "bert"}) for size, swin in SWIN_SIZES.items()},
    },
    released=_RELEASED,
)
class LAVT(ReferringModel):
    """BERT first, then Swin with a PWAM after each stage; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
