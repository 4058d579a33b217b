"""NSNPRIS: CLIP's encoders advance side by side and exchange, and a kernel made of the sentence finds its pixels.

In the style of NSNPRIS (IJNS 2024), referring segmentation with nonlinear spiking neural P systems: the code of its
fusion and layers is public (see `fusion.bridge`), that of the rest is not. Our choice: neck, decoder and projector are
CRIS's, of which theirs are variants, and the sentence is the mean of the words after the last exchange. No weights were
published.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import SWIN_SIZES

_INPUT = {"size": 416, "fit": "letterbox", "max_tokens": 17, "threshold": 0.35}

_CLIP: dict[str, Any] = {
    "image": {"kind": "clip_resnet"},
    "text": {"kind": "clip_text", "schedule": "slices", "joint_width": None},
    "fusion": {"kind": "bridge"},
    "head": {"kind": "text_kernel"},
    "input": _INPUT,
}

_SWIN: dict[str, Any] = {
    "image": SWIN_SIZES["swin_b"],
    "text": {"kind": "bert", "schedule": "slices"},
    "fusion": {"kind": "bridge", "widths": (384, 768, 1024)},
    "head": {"kind": "text_kernel"},
}

_TINY: dict[str, Any] = {
    "image": {"kind": "clip_resnet", "stem": 16, "blocks": (1, 1, 1, 1), "joint_width": 64, "table_side": 4},
    "text": {
        "kind": "clip_text",
        "schedule": "slices",
        "vocab_size": 1280,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "max_positions": 64,
        "joint_width": None,
    },
    "fusion": {
        "kind": "bridge",
        "width": 32,
        "num_heads": 4,
        "feedforward": 64,
        "joint_width": 64,
        "widths": (32, 64, 128),
    },
    "head": {"kind": "text_kernel", "layers": 2, "num_heads": 4, "feedforward": 128, "dropout": 0.0},
    "input": {**_INPUT, "size": 128, "max_tokens": 20, "tokenizer": "wordpiece"},  # CLIP's vocabulary does not ship
}


@register("nsnpris", presets={"nsnpris_tiny": _TINY, "nsnpris_clip_r50": _CLIP, "nsnpris_swin_b": _SWIN}, released=None)
class NSNPRIS(ReferringModel):
    """Maps of strides 8, 16 and 32 meet the words after a third of the text's layers each; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
