"""WGFM and SGCE: words modulate pixels in the encoder, the sentence gathers their context in the head.

In the style of a work of PRCV 2020 of which only the abstract is public; sizes and forms are our choice.
"""

from __future__ import annotations

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import TINY_BERT


@register(
    "wgfm",
    presets={
        "wgfm_tiny": {
            "image": {"kind": "resnet", "name": "test_resnet"},
            "text": TINY_BERT,
            "fusion": {"kind": "word_film"},
            "head": {"kind": "sentence_context", "width": 32, "dilations": (1, 2, 4)},
        },
        "wgfm_resnet101": {
            "image": {"kind": "resnet", "name": "resnet101"},
            "text": {"kind": "bert"},
            "fusion": {"kind": "word_film"},
            "head": {"kind": "sentence_context"},
        },
    },
)
class WGFM(ReferringModel):
    """Words enter after the stages of strides 8, 16 and 32; masks have ⌈H/8⌉×⌈W/8⌉."""

    config: ModelConfig
