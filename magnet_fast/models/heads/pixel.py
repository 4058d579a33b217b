"""A logit for each pixel of one map: for fusions that have done the rest."""

from __future__ import annotations

from typing import Literal

from torch import nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction


@part
class PixelConfig(HeadConfig):
    """A 1x1 convolution."""

    kind: Literal["pixel"] = "pixel"

    def pixel_channels(self, shapes: Shapes) -> int:
        return shapes.channels[0]

    def check(self, shapes: Shapes) -> None:
        if len(shapes.channels) != 1:
            raise ValueError(f"head: pixel reads one map; this fusion gives {len(shapes.channels)}")

    def build(self, shapes: Shapes) -> Pixel:
        return Pixel(shapes)


class Pixel(Head):
    """The mask has the map's size; `pixels` is the map."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        (self.pixel_channels,) = shapes.channels
        self.classify = nn.Linear(self.pixel_channels, 1)

    def forward(self, features: Features) -> Prediction:
        (x,) = features.maps
        mask = self.classify(x)[..., 0]
        return Prediction(mask, pixels=x.permute(0, 3, 1, 2), words=features.words, aligned_corners=False)
