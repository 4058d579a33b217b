"""No fusion beside the encoder: maps and words reach the head as their encoders made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words


@part
class NoFusionConfig(FusionConfig):
    """Nothing, for heads in which words and pixels meet."""

    kind: Literal["none"] = "none"

    def build(self, image: ImageConfig, text: TextConfig) -> NoFusion:
        return NoFusion()


class NoFusion(Fusion):
    """Every map is the output of its stage, and goes on as it is."""

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        return Step(x, x, words)
