"""Is anything named here? Parts for models whose head does not say.

`token_exist` is RefSegformer's exist head (Wu et al., TIP 2024); `exist` is one in its style that reads words, so that
it stands on any model [our choice].
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.attention import TokenAttention
from magnet_fast.models.base import Presence
from magnet_fast.models.config import PresenceConfig, Shapes, part
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

    def check(self, shapes: Shapes) -> None:
        if self.stage >= len(shapes.channels):
            raise ValueError(f"presence.stage={self.stage}: this model has stages 0 to {len(shapes.channels) - 1}")

    def build(self, shapes: Shapes) -> Exist:
        return Exist(shapes.channels[self.stage], shapes.text_width, self)


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


@part
class TokenExistConfig(PresenceConfig):
    """The head's pixels ask the tokens of one stage, and their mean answers."""

    kind: Literal["token_exist"] = "token_exist"
    stage: int = Field(1, ge=0, description="whose tokens are asked")
    head_dim: int = Field(32, gt=0, description="channels of an attention's head")

    def check(self, shapes: Shapes) -> None:
        width = shapes.tokens[self.stage] if self.stage < len(shapes.tokens) else None
        if width is None:
            raise ValueError(f"presence.stage={self.stage}: this model has no tokens there; kind 'exist' needs none")
        if shapes.pixels is None:
            raise ValueError("presence: token_exist reads the head's embedding of pixels; this head gives none")
        if width % self.head_dim:
            raise ValueError(f"presence.head_dim={self.head_dim} does not divide the {width} channels of the tokens")

    def build(self, shapes: Shapes) -> TokenExist:
        return TokenExist(shapes.pixels, shapes.tokens[self.stage], self)


class TokenExist(Presence):
    """forward gives a logit for each item of a batch, (B,). Pixels and tokens are detached: it never moves the model.

    The queries' Linear takes the pixels' width, which in the released model is that of the tokens [our choice].
    """

    def __init__(self, pixel_channels: int, width: int, config: TokenExistConfig) -> None:
        super().__init__()
        self.stage = config.stage
        self.attention = TokenAttention(width, width // config.head_dim, query_width=pixel_channels)
        self.classify = nn.Linear(width, 1)

    def forward(self, features: Features, prediction: Prediction) -> Tensor:
        pixels = prediction.pixels.detach().flatten(2).transpose(1, 2)
        read = self.attention(pixels, features.tokens[self.stage].detach())
        return self.classify(read.mean(dim=1))[:, 0]
