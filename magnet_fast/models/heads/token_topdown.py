"""From the coarsest map to the finest, reading the fusion's tokens on the way: RefSegformer's light head."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.attention import TokenAttention
from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction, changed
from magnet_fast.models.heads.topdown import ConvBlock


@part
class TokenTopDownConfig(HeadConfig):
    """LAVT's way down, with attention to tokens; for fusions that give some."""

    kind: Literal["token_topdown"] = "token_topdown"
    head_dim: int = Field(32, gt=0, description="channels of an attention's head")

    def pixel_channels(self, shapes: Shapes) -> int:
        return shapes.channels[_pixel_stage(shapes.channels)]

    def check(self, shapes: Shapes) -> None:
        if not any(shapes.tokens):
            raise ValueError("head: token_topdown reads the fusion's tokens; this one gives none")
        for stage, (width, channels) in enumerate(zip(shapes.tokens, shapes.channels, strict=True)):
            if width is not None and channels % self.head_dim:
                raise ValueError(f"head.head_dim={self.head_dim} does not divide the {channels} channels of {stage}")

    def build(self, shapes: Shapes) -> TokenTopDown:
        return TokenTopDown(shapes, self)


class TokenTopDown(Head):
    """At every stage: pixels read the tokens, two logits are made, then the map is enlarged and joined to the next.

    The finest stage's prediction counts; those of the coarser ones are the earlier ones. `pixels` is the second stage's
    map before it reads its tokens.
    """

    def __init__(self, shapes: Shapes, config: TokenTopDownConfig) -> None:
        super().__init__()
        channels = shapes.channels
        self.pixel_stage = _pixel_stage(channels)
        self.pixel_channels = channels[self.pixel_stage]
        self.reads = nn.ModuleDict(
            {
                str(stage): TokenRead(channels[stage], width, config.head_dim)
                for stage, width in enumerate(shapes.tokens)
                if width is not None
            }
        )
        self.blocks = nn.ModuleList(
            ConvBlock(coarse + fine, fine) for fine, coarse in zip(channels, channels[1:], strict=False)
        )
        self.classify = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in channels)

    def forward(self, features: Features) -> Prediction:
        maps = [feature.permute(0, 3, 1, 2) for feature in features.maps]
        x, predictions, pixels = maps[-1], [], None
        for stage in reversed(range(len(maps))):
            if stage == self.pixel_stage:
                pixels = x
            if str(stage) in self.reads:
                x = self.reads[str(stage)](x, features.tokens[stage])
            background, referent = self.classify[stage](x).unbind(dim=1)
            predictions.append(Prediction(referent - background))
            if stage > 0:
                skip = maps[stage - 1]
                x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
                x = self.blocks[stage - 1](torch.cat([x, skip], dim=1))
        *earlier, last = predictions
        return changed(last, earlier=tuple(earlier), pixels=pixels, words=features.words)


class TokenRead(nn.Module):
    """x + BatchNorm(attention of its pixels to the tokens); nothing is added at first."""

    def __init__(self, channels: int, token_width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = TokenAttention(channels, channels // head_dim, key_width=token_width)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        for linear in self.attention.children():
            nn.init.normal_(linear.weight, std=0.001)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, C, H, W), tokens (B, N, K)."""
        read = self.attention(x.flatten(2).transpose(1, 2), tokens)
        return x + self.norm(read.transpose(1, 2).unflatten(2, x.shape[2:]))


def _pixel_stage(channels: tuple[int, ...]) -> int:
    return min(1, len(channels) - 1)
