"""RNR: regions of the road that a command names (Rufus et al., "Grounding Linguistic Commands to Navigable Regions",
IROS 2021).

Written from its published code, whose outputs it reproduces; weights were not published.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import DILATED_RESNET101, TINY_DILATED_RESNET, TINY_VECTORS_LSTM

_HEAD: dict[str, Any] = {
    "kind": "aspp",
    "width": 1024,
    "dilations": (1, 6, 12, 24),
    "enlarge": (512, 256, 128),
    "dropout": 0.25,
    "image_norm": "batch",
}


@register(
    "rnr",
    presets={
        "rnr_tiny": {
            "image": {**TINY_DILATED_RESNET, "multi_grid": (2,)},
            "text": TINY_VECTORS_LSTM,
            "fusion": {"kind": "joint", "width": 64, "side": 8, "feedforward": 64, "dropout": 0.0},
            "head": {"kind": "aspp", "width": 64, "dilations": (1, 2, 3), "enlarge": (64, 32)},
            "input": {"size": 128},
        },
        "rnr_resnet101": {
            "image": {**DILATED_RESNET101, "frozen": True, "multi_grid": (2, 4, 8)},
            "text": {"kind": "vectors_lstm"},
            "fusion": {"kind": "joint"},
            "head": _HEAD,
            "input": {"size": 448, "max_tokens": 40, "threshold": 0.1},
        },
    },
)
class RNR(ReferringModel):
    """A dilated ResNet, held fixed, beside word vectors and an LSTM; masks have 112 x 112 logits for any image."""

    config: ModelConfig
