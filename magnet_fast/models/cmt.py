"""CMT: plain encoders, and a transformer in which words become queries (Zhang et al., Neurocomputing 2023).

In the style of Wenjing Zhang et al., "Cross-modal transformer with language query for referring image segmentation":
only its abstract is public, all sizes are our choice.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN


def _parts(image: dict[str, Any]) -> dict[str, Any]:
    return {"image": image, "text": {"kind": "bert"}, "fusion": {"kind": "none"}, "head": {"kind": "language_query"}}


@register(
    "cmt",
    presets={
        "cmt_tiny": {
            **_parts(TINY_SWIN),
            "text": TINY_BERT,
            "head": {"kind": "language_query", "width": 64, "num_heads": 4, "layers": 1, "feedforward": 128},
        },
        "cmt_swin_b": _parts(SWIN_SIZES["swin_b"]),
        "cmt_resnet101": _parts({"kind": "timm", "name": "resnet101"}),
    },
)
class CMT(ReferringModel):
    """BERT and the image encoder apart, then the transformer; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
