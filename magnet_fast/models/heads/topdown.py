"""LAVT's head: coarse to fine by resizing, concatenating and convolving (Yang et al., CVPR 2022)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction


@part
class TopDownConfig(HeadConfig):
    """Convolutions from the coarsest map to the finest."""

    kind: Literal["topdown"] = "topdown"
    width: int | None = Field(None, gt=0, description="channels between the maps; none: four times the finest's")

    def pixel_channels(self, shapes: Shapes) -> int:
        return self._width(shapes) if len(shapes.channels) > 1 else shapes.channels[0]

    def build(self, shapes: Shapes) -> TopDown:
        return TopDown(shapes.channels, self._width(shapes))

    def _width(self, shapes: Shapes) -> int:
        return self.width or 4 * shapes.channels[0]


class TopDown(Head):
    """Resize to the finer map, concatenate, two convolutions; then a logit for the background and one for the referent.

    The mask, their difference, has the finest map's size; `pixels` is the map that it is read from.
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        coarse, *finer = reversed(channels)
        blocks = []
        for skip in finer:
            blocks.append(ConvBlock(coarse + skip, width))
            coarse = width
        self.blocks = nn.ModuleList(blocks)
        self.pixel_channels = coarse
        self.classify = nn.Conv2d(coarse, 2, 1)

    def forward(self, features: Features) -> Prediction:
        x, *finer = (feature.permute(0, 3, 1, 2) for feature in reversed(features.maps))
        for block, skip in zip(self.blocks, finer, strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = block(torch.cat((x, skip), dim=1))
        background, referent = self.classify(x).unbind(dim=1)
        return Prediction(referent - background, pixels=x, words=features.words)


class ConvBlock(nn.Sequential):
    """Twice: convolution 3×3 without bias, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
