"""TV-Net: maps are enriched with those of an image retrieved by picture and sentence, then fused, then drawn finely.

In the style of TV-Net (a retrieval-enriched segmentation by referring expressions), of which an abstract and a figure
are public; no code, no sizes, no weights. What its parts are in detail is our choice: see `fusion.enrich`, `heads.amf`
and `magnet_fast.data.retrieval`. So are the fusion and the head inside, and BERT in place of word vectors and an LSTM.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import TINY_BERT, TINY_SWIN

_TINY_FPN: dict[str, Any] = {"kind": "fpn", "width": 64, "num_heads": 4, "points": 4, "layers": 1, "feedforward": 128}


def _parts(image: dict[str, Any], text: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": image,
        "text": text,
        "fusion": {"kind": "enrich", "inner": {"kind": "pwam"}},
        "head": {"kind": "amf", "inner": head},
    }


@register(
    "tvnet",
    presets={
        "tvnet_tiny": _parts(TINY_SWIN, TINY_BERT, _TINY_FPN),
        "tvnet_resnet101": _parts({"kind": "timm", "name": "resnet101"}, {"kind": "bert"}, {"kind": "fpn"}),
    },
    released=None,
)
class TVNet(ReferringModel):
    """Its context holds `reference_image`; without one image and sentence alone answer. Masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
