"""Sentence-granularity context extraction: the sentence gathers each map to one vector, which goes back to its pixels.

In the style of SGCE (PRCV 2020), of which only the abstract is public: all of this is our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from magnet_fast.models.attention import SentenceRead
from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.encoders.clip_resnet import conv_norm_relu
from magnet_fast.models.fusion.neck import enlarge
from magnet_fast.models.heads.aspp import ASPP


@part
class SentenceContextConfig(HeadConfig):
    """Context of every map, coarse to fine by addition, then an ASPP."""

    kind: Literal["sentence_context"] = "sentence_context"
    width: int = Field(256, gt=0, description="channels of everything inside")
    dilations: tuple[PositiveInt, ...] = Field((1, 6, 12, 18), min_length=1, description="as of head aspp")

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.width

    def build(self, shapes: Shapes) -> SentenceContext:
        return SentenceContext(shapes, self)


class SentenceContext(Head):
    """The mask has the finest map's size; `pixels` is the map below it."""

    def __init__(self, shapes: Shapes, config: SentenceContextConfig) -> None:
        super().__init__()
        self.pixel_channels = width = config.width
        self.lateral = nn.ModuleList(nn.Linear(channels, width) for channels in shapes.channels)
        self.contexts = nn.ModuleList(Context(width, shapes.sentence_width) for _ in shapes.channels)
        self.smooth = nn.ModuleList(nn.Sequential(*conv_norm_relu(width, width)) for _ in shapes.channels[1:])
        self.aspp = ASPP(width, width, config.dilations)
        self.classify = nn.Conv2d(width, 1, 1)

    def forward(self, features: Features) -> Prediction:
        sentence = features.words.sentence
        maps = [
            context(lateral(x), sentence)
            for context, lateral, x in zip(self.contexts, self.lateral, features.maps, strict=True)
        ]
        *finer, x = maps
        for smooth, level in zip(reversed(self.smooth), reversed(finer), strict=True):
            x = smooth(level + enlarge(x, level.shape[2:]))
        pixels = self.aspp(x)
        mask = self.classify(pixels)[:, 0]
        return Prediction(mask, pixels=pixels, words=features.words, aligned_corners=False)


class Context(nn.Module):
    """The sentence attends to the pixels; what it finds, and the sentence itself, join every pixel.

    forward(x (B, H, W, C), sentence (B, E)) returns (B, C, H, W).
    """

    def __init__(self, width: int, sentence_width: int) -> None:
        super().__init__()
        self.read = SentenceRead(width, sentence_width, width)
        self.sentence = nn.Linear(sentence_width, width)
        self.join = nn.Sequential(*conv_norm_relu(3 * width, width, size=1))

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        whole = torch.cat([self.read(x, sentence), self.sentence(sentence)], dim=1)
        joined = torch.cat([x, whole[:, None, None].expand(-1, *x.shape[1:3], -1)], dim=3)
        return self.join(joined.permute(0, 3, 1, 2))
