"""FSFI: a dilated ResNeSt whose stages take up what a grid of cells reads in the words (Yang et al., TNNLS 2024).

Its released code lacks the dynamic convolution, and no weights are published. Images are normalised as the encoder's
own weights want it; the released code has a BatchNorm in that place.
"""

from __future__ import annotations

from typing import Any

from magnet_fast.models.base import ReferringModel
from magnet_fast.models.config import ModelConfig
from magnet_fast.models.registry import register
from magnet_fast.models.sizes import TINY_BERT, TINY_DILATED_RESNET


def _parts(
    resnet: dict[str, Any], text: dict[str, Any], fusion: dict[str, Any], head: dict[str, Any]
) -> dict[str, Any]:
    return {
        "image": {**resnet, "stem": True},
        "text": text,
        "fusion": {"kind": "funnel", "first": 1, **fusion},
        "head": {"kind": "maed", **head},
        "input": {"size": 320},
    }


_RESNEST101 = {"kind": "resnet", "name": "resnest101e", "arguments": {"output_stride": 16}}


@register(
    "fsfi",
    presets={
        "fsfi_tiny": _parts(TINY_DILATED_RESNET, TINY_BERT, {"width": 32, "heads": 4, "grid": 4}, {"width": 32}),
        "fsfi_resnest101": _parts(_RESNEST101, {"kind": "bert"}, {}, {}),
    },
)
class FSFI(ReferringModel):
    """Maps of strides 4 (the stem's), 4, 8, 16 and 16, a funnel after each but the first; masks have ⌈H/4⌉×⌈W/4⌉."""

    config: ModelConfig
