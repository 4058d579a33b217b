"""A pixel decoder and a 1x1 convolution: RefSegformer's head as published (Wu et al., TIP 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.heads.pixel_decoder import PixelDecoderConfig, PyramidPixelDecoder


@part
class FPNConfig(PixelDecoderConfig):
    """Sizes of the pixel decoder."""

    kind: Literal["fpn"] = "fpn"
    layers: int = Field(6, gt=0)
    feedforward: int = Field(1024, gt=0)

    def check(self, shapes: Shapes) -> None:
        check_levels(shapes)

    def build(self, shapes: Shapes) -> FPN:
        return FPN(shapes.channels, self)


class FPN(Head):
    """One prediction, of a logit for the background and one for the referent; it has the finest map's size."""

    def __init__(self, channels: tuple[int, ...], config: FPNConfig) -> None:
        super().__init__()
        self.pixel_channels = config.width
        self.pixel_decoder = PyramidPixelDecoder(
            channels,
            width=config.width,
            num_heads=config.num_heads,
            points=config.points,
            layers=config.layers,
            feedforward=config.feedforward,
        )
        self.classify = nn.Conv2d(config.width, 2, 1)

    def forward(self, features: Features) -> Prediction:
        _, pixels = self.pixel_decoder(features.maps)
        background, referent = self.classify(pixels).unbind(dim=1)
        return Prediction(referent - background, pixels=pixels, words=features.words)


def check_levels(shapes: Shapes) -> None:
    """Raise a ValueError for a model of one stage: a `PyramidPixelDecoder` mixes all but the finest."""
    if len(shapes.channels) < 2:
        raise ValueError(f"head: it mixes the stages above the finest; this model has {len(shapes.channels)} in all")
