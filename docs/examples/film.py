"""A complete small system: the sentence scales and shifts every channel, and the maps are summed up (FiLM and an FPN).

Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018; Lin et al., "Feature Pyramid
Networks for Object Detection", CVPR 2017. Importing this file is all it takes: `models.create("film_tiny")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models import Features, Prediction, Step, Words, register
from magnet_fast.models.base import Fusion, Head, ReferringModel
from magnet_fast.models.config import FusionConfig, HeadConfig, ImageConfig, Shapes, TextConfig, part
from magnet_fast.models.sizes import SWIN_SIZES, TINY_BERT, TINY_SWIN


@part  # makes the kind known: any system may now say fusion={"kind": "film"}
class FilmConfig(FusionConfig):
    """Settings of the fusion; an unknown or wrong one is refused when a configuration is read."""

    kind: Literal["film"] = "film"

    def build(self, image: ImageConfig, text: TextConfig) -> Film:
        return Film(image, text)


class Film(Fusion):
    """x · (1 + scale) + shift after every stage; scale and shift are read off the sentence."""

    def __init__(self, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(text.width, 2 * channels) for channels in image.channels)
        for linear in self.stages:  # the image encoder's own maps, to begin with
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        # x (B, H, W, C), words.sentence (B, D)
        scale, shift = self.stages[i](words.sentence)[:, None, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
        return Step(output=x, stream=x, words=words)


@part
class PyramidConfig(HeadConfig):
    """Settings of the head."""

    kind: Literal["pyramid"] = "pyramid"
    width: int = Field(128, gt=0, description="channels of the sum")

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.width

    def build(self, shapes: Shapes) -> Pyramid:
        return Pyramid(shapes.channels, self.width)


class Pyramid(Head):
    """Every map to one width; coarse ones are enlarged and added to finer ones; a logit a pixel of the finest."""

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.pixel_channels = width
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.classify = nn.Conv2d(width, 1, 1)

    def forward(self, features: Features) -> Prediction:
        maps = [conv(x.permute(0, 3, 1, 2)) for conv, x in zip(self.lateral, features.maps, strict=True)]
        *finer, total = maps
        for x in reversed(finer):  # sizes come from the maps: strides may repeat, and need not halve
            total = x + F.interpolate(total, size=x.shape[-2:], mode="bilinear", align_corners=False)
        pixels = F.relu(self.smooth(total))
        # `pixels` is what an alignment loss reads; a head without such an embedding leaves it out.
        return Prediction(self.classify(pixels)[:, 0], pixels=pixels, words=features.words)


@register(
    "film",
    presets={
        "film_tiny": {
            "image": TINY_SWIN,
            "text": TINY_BERT,
            "fusion": {"kind": "film"},
            "head": {"kind": "pyramid", "width": 32},
        },
        "film_swin_t": {
            "image": SWIN_SIZES["swin_t"],
            "text": {"kind": "bert"},
            "fusion": {"kind": "film"},
            "head": {"kind": "pyramid"},
        },
    },
)
class FilmModel(ReferringModel):
    """The host runs the parts; a system adds nothing but its name, its presets and, where its authors released files,
    how these are read (`released=`, see `magnet_fast/models/lavt.py`)."""
