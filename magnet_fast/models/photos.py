"""A small model for photographs: pretrained encoders by name, pixels that say their object's box, then words.

Our own: there is no paper, and no released file.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register

_MINILM: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_dropout_prob": 0.0,  # it is held fixed
    "attention_probs_dropout_prob": 0.0,
}


@register(
    "photos",
    presets={
        "photos_lite0": {
            "image": {"kind": "timm", "name": "tf_efficientnet_lite0", "frozen_norms": True},
            "text": {"kind": "transformers", "name": "sentence-transformers/all-MiniLM-L6-v2", "settings": _MINILM},
            "fusion": {"kind": "objects"},
            "head": {"kind": "pixel"},
            # The threshold was chosen on photographs: of small objects it leaves more than 0.5 does.
            "input": {"size": 320, "max_tokens": 20, "threshold": 0.2},
        }
    },
)
class Photos(ReferringModel):
    """EfficientNet-Lite0's four maps, the first four layers of MiniLM; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
