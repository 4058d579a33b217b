"""Superpixels as visual words that meet the words of the sentence (in the style of arXiv 2509.13676; our choices)."""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN


def _parts(swin: dict[str, Any], bert: dict[str, Any], fusion: dict[str, Any]) -> dict[str, Any]:
    return {"image": swin, "text": bert, "fusion": {"kind": "superpixel", **fusion}, "head": {"kind": "query_mask"}}


@register(
    "superpixel",
    presets={
        "superpixel_tiny": _parts(TINY_SWIN, TINY_BERT, {"width": 64, "num_heads": 4, "layers": 2, "feedforward": 128}),
        "superpixel_swin_b": _parts(SWIN_SIZES["swin_b"], {"kind": "bert"}, {}),
    },
)
class SuperpixelModel(ReferringModel):
    """Its context holds `superpixels`, which the data set or SLIC makes; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
