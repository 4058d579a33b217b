"""Relation alignment: LAVT's encoder, and relations of instances against the sentence's (Pu et al., NPL 2024).

In the style of Mingxing Pu et al., "Text-Vision Relationship Alignment for Referring Image Segmentation", Neural
Processing Letters 2024; the parts' formulas, the encoder and all sizes are our choice.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN


def _parts(image: dict[str, Any], text: dict[str, Any], **head: int) -> dict[str, Any]:
    return {"image": image, "text": text, "fusion": {"kind": "pwam"}, "head": {"kind": "relation", **head}}


@register(
    "relation_alignment",
    presets={
        "relation_alignment_tiny": _parts(TINY_SWIN, TINY_BERT, width=64, instances=8, num_heads=4),
        "relation_alignment_swin_b": _parts(SWIN_SIZES["swin_b"], {"kind": "bert"}),
    },
)
class RelationAlignment(ReferringModel):
    """BERT first, then Swin with a PWAM after each stage, then instances and relations; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
