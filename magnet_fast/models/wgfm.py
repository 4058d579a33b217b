"""WGFM and SGCE: words modulate pixels in the encoder, the sentence gathers their context in the head.

In the style of a work of PRCV 2020 of which only the abstract is public; sizes and forms are our choice.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import RESNET101, TINY_RESNET, TINY_VECTORS_LSTM


def _parts(resnet: dict[str, Any], text: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": resnet,
        "text": text,
        "fusion": {"kind": "word_film", "stages": (1, 2, 3)},  # strides 8, 16 and 32
        "head": {"kind": "sentence_context", **head},
    }


@register(
    "wgfm",
    presets={
        "wgfm_tiny": _parts(TINY_RESNET, TINY_VECTORS_LSTM, {"width": 64, "dilations": (1, 2, 3)}),
        "wgfm_resnet101": _parts(RESNET101, {"kind": "vectors_lstm"}, {}),
    },
)
class WGFM(ReferringModel):
    """Words enter after the stages of strides 8, 16 and 32; masks have ⌈H/8⌉×⌈W/8⌉."""

    config: ModelConfig
