"""TV-Net: maps are enriched with those of an image retrieved by picture and sentence, then fused, then drawn finely.

In the style of "Two-stage Visual Cues Enhancement Network for Referring Image Segmentation" (ACM MM 2021), of which an
abstract and a figure are public; no code, no sizes, no weights. What its parts are in detail is our choice: see
`fusion.enrich`, `heads.amf` and `magnet_fast.data.references`. So are PWAM and ASPP as the fusion and the head inside.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import RESNET101, TINY_RESNET, TINY_VECTORS_LSTM


def _parts(resnet: dict[str, Any], text: dict[str, Any], aspp: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": resnet,
        "text": text,
        "fusion": {"kind": "enrich", "inner": {"kind": "pwam"}},
        "head": {"kind": "amf", "inner": {"kind": "aspp", **aspp}},
    }


@register(
    "tvnet",
    presets={
        "tvnet_tiny": _parts(TINY_RESNET, TINY_VECTORS_LSTM, {"width": 64, "dilations": (1, 2, 3)}),
        "tvnet_resnet101": _parts(RESNET101, {"kind": "vectors_lstm"}, {}),
    },
    released=None,
)
class TVNet(ReferringModel):
    """Its context holds `reference_image`; without one image and sentence alone answer. Masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
