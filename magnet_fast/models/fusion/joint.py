"""RNR's fusion: pixels and words of each map are tokens of one transformer (Rufus et al., IROS 2021, and its code).

The same layers read every map: what is learned of words serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.attention import Attention
from magnet_fast.models.base import LateFusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.position import grid_position, line_position


@part
class JointConfig(FusionConfig):
    """The coarsest maps, brought to `side` x `side` pixels, to one map of as many pixels and `width` channels of each.

    Whatever the size of the image, that is the map's: RNR's of 448 x 448 pixels give a stride of 32.
    """

    kind: Literal["joint"] = "joint"
    maps: int = Field(3, gt=0, description="how many of the image encoder's maps, the coarsest ones")
    width: int = Field(512, gt=0, multiple_of=4)
    side: int = Field(14, gt=0, description="pixels that a map is pooled to, to each side")
    num_heads: int = Field(8, gt=0)
    layers: int = Field(1, gt=0)
    feedforward: int = Field(512, gt=0)
    dropout: float = Field(0.25, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> JointConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if self.maps > len(image.channels):
            raise ValueError(f"fusion.maps={self.maps}: the image encoder has {len(image.channels)}")
        if text.width != self.width:
            raise ValueError(f"fusion.width={self.width}: words, which are tokens beside pixels, have {text.width}")

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return (self.maps * self.width,)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return image.strides[-1:]

    def build(self, image: ImageConfig, text: TextConfig) -> JointFusion:
        return JointFusion(self, image)


class JointFusion(LateFusion):
    """Gives one map (B, side, side, maps · width); the text encoder's words go on as they came."""

    def __init__(self, config: JointConfig, image: ImageConfig) -> None:
        super().__init__()
        width, self.stages, self.side = config.width, len(image.channels), config.side
        self.pool = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU())
            for channels in image.channels[-config.maps :]
        )
        self.layers = nn.ModuleList(
            JointLayer(width, config.num_heads, config.feedforward, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.fuse = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU())

    def look(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps of stages, (B, side, side, width) each."""
        return [
            pool(largest(x, 2 * self.side).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            for pool, x in zip(self.pool, maps[-len(self.pool) :], strict=True)
        ]

    def join(self, seen: list[Tensor], words: Words, context: Mapping[str, Tensor]) -> Step:
        joined = torch.cat([self._one(x, words) for x in seen], dim=-1)
        return Step(joined, joined, words)

    def _one(self, x: Tensor, words: Words) -> Tensor:
        """A map (B, side, side, width) and the words to the same of both."""
        count, width = words.features.shape[1], x.shape[3]
        place = torch.cat([grid_position(*x.shape[1:3], width, x), line_position(count, width, x)])
        mask = F.pad(words.mask, (self.side**2, 0), value=True)
        tokens = torch.cat([x.flatten(1, 2), words.features], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, place, mask)
        pixels, read = self.norm(tokens).split([self.side**2, count], dim=1)
        sentence = words._replace(features=read, pooled=None).sentence
        both = torch.cat([pixels, sentence[:, None].expand_as(pixels)], dim=-1)
        fused = self.fuse(both.transpose(1, 2).unflatten(2, x.shape[1:3]))
        return fused.permute(0, 2, 3, 1)


class JointLayer(nn.Module):
    """Tokens of all kinds attend to one another, then a feed-forward network; pre-norm.

    forward(x (B, N, C), place (N, C), which queries and keys know and values do not, mask (B, N) bool, True for what
    may be read) returns (B, N, C).
    """

    is_repeated_layer = True

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.feedforward = nn.Sequential(
            nn.Linear(width, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y + place, y + place, y, mask[:, None, None]))
        return x + self.dropout(self.feedforward(self.norm2(x)))


def largest(x: Tensor, side: int) -> Tensor:
    """Adaptive max pooling, a direction at a time: (B, H, W, C) to (B, side, side, C).

    PyTorch's own has no deterministic backward pass on a GPU, and no form in ONNX.
    """
    for dim in (1, 2):
        length = x.shape[dim]
        cells = torch.arange(side, device=x.device)
        first, last = cells * length // side, ((cells + 1) * length + side - 1) // side - 1
        most = length // side if length % side == 0 else length // side + 2
        places = torch.minimum(first[:, None] + torch.arange(most, device=x.device), last[:, None])
        x = x.index_select(dim, places.flatten()).unflatten(dim, (side, most)).amax(dim + 1)
    return x
