"""Is anything named here? A part for models whose head does not say.

In the style of RefSegformer's exist head (Wu et al., TIP 2024); that it reads words where a fusion keeps no tokens is
our choice, and lets it stand on any model.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import Presence
from magnet_fast.models.config import PresenceConfig, part
from magnet_fast.models.contract import Features, Prediction


@part
class ExistConfig(PresenceConfig):
    """Pixels of one stage ask the words, and their mean answers."""

    kind: Literal["exist"] = "exist"
    stage: int = Field(1, ge=0, description="whose pixels ask: 0 is the finest map")
    width: int = Field(256, gt=0)
    heads: int = Field(8, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> ExistConfig:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self

    def check(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        if self.stage >= len(channels):
            raise ValueError(f"presence.stage={self.stage}: this model has stages 0 to {len(channels) - 1}")

    def build(self, channels: tuple[int, ...], strides: tuple[int, ...], text_width: int) -> Exist:
        return Exist(channels[self.stage], text_width, self)


class Exist(Presence):
    """forward gives a logit for each item of a batch, (B,). Pixels and words are detached: it never moves the model."""

    def __init__(self, channels: int, text_width: int, config: ExistConfig) -> None:
        super().__init__()
        self.stage, self.heads = config.stage, config.heads
        self.query = nn.Linear(channels, config.width)
        self.key = nn.Linear(text_width, config.width)
        self.value = nn.Linear(text_width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.classify = nn.Linear(config.width, 1)

    def forward(self, features: Features, prediction: Prediction) -> Tensor:
        pixels = features.maps[self.stage].detach().flatten(1, 2)
        words = features.words.features.detach()
        attended, _ = ops.cross_modal_attention(
            self.query(pixels),
            self.key(words),
            self.value(words),
            text_mask=features.words.mask,
            num_heads=self.heads,
        )
        return self.classify(self.output(attended).mean(dim=1))[:, 0]
