"""LDA: what the whole sentence says of channels and of places, at several levels (ICRA 2021).

In the style of "Language-driven attention for referring image segmentation", of which only the abstract is public: the
parts' formulas and sizes are our choice.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import RESNET101, TINY_BERT, TINY_RESNET


def _parts(resnet: dict[str, Any], text: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": resnet,
        "text": text,
        "fusion": {"kind": "lda", "stages": (1, 2, 3)},  # strides 8, 16 and 32
        "head": {"kind": "aspp", **head},
    }


@register(
    "lda",
    presets={
        "lda_tiny": _parts(TINY_RESNET, TINY_BERT, {"width": 64, "dilations": (1, 2, 3)}),
        "lda_resnet101": _parts(RESNET101, {"kind": "bert"}, {}),
    },
)
class LDA(ReferringModel):
    """BERT first, then a ResNet with language-driven attention after its last three stages; masks have ⌈H/8⌉×⌈W/8⌉."""

    config: ModelConfig
