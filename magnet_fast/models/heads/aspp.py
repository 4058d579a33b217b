"""Atrous spatial pyramid pooling over several levels: one map seen with receptive fields of several sizes.

The block is DeepLabv3's (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.encoders.clip_resnet import conv_norm_relu
from magnet_fast.models.fusion.neck import enlarge

ImageNorm = Literal["layer", "batch"]


@part
class AsppConfig(HeadConfig):
    """All maps at the finest's size, joined, then an `ASPP`, convolutions that enlarge, and a logit a pixel."""

    kind: Literal["aspp"] = "aspp"
    width: int = Field(256, gt=0, description="channels of each branch, and of the map that the branches make")
    dilations: tuple[PositiveInt, ...] = Field(
        (1, 6, 12, 18), min_length=1, description="of the branches; 1 is a 1x1 convolution, the others are 3x3"
    )
    lateral: int | None = Field(None, gt=0, description="channels of each map before they are joined; none: its own")
    enlarge: tuple[PositiveInt, ...] = Field((), description="channels after each of the steps that double the size")
    dropout: float = Field(0.0, ge=0, lt=1, description="after the ASPP")
    image_norm: ImageNorm = Field("layer", description="of the image mean, see ASPP")

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.enlarge[-1] if self.enlarge else self.width

    def build(self, shapes: Shapes) -> AsppHead:
        return AsppHead(shapes, self)


class AsppHead(Head):
    """The mask has the finest map's size, twice that for every step of `enlarge`; `pixels` is the map below it."""

    def __init__(self, shapes: Shapes, config: AsppConfig) -> None:
        super().__init__()
        self.pixel_channels = config.pixel_channels(shapes)
        self.lateral = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(channels, config.lateral, size=1)) if config.lateral else nn.Identity()
            for channels in shapes.channels
        )
        joined = sum(config.lateral or channels for channels in shapes.channels)
        self.aspp = ASPP(joined, config.width, config.dilations, dropout=config.dropout, image_norm=config.image_norm)
        widths = (config.width, *config.enlarge)
        self.enlarge = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(before, after)) for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.classify = nn.Conv2d(self.pixel_channels, 1, 3, padding=1)

    def forward(self, features: Features) -> Prediction:
        maps = [conv(x.permute(0, 3, 1, 2)) for conv, x in zip(self.lateral, features.maps, strict=True)]
        pixels = self.aspp(torch.cat([enlarge(x, maps[0].shape[2:]) for x in maps], dim=1))
        for conv in self.enlarge:
            pixels = F.interpolate(conv(pixels), scale_factor=2, mode="bilinear", align_corners=True)
        return Prediction(self.classify(pixels)[:, 0], pixels=pixels, words=features.words)


class ASPP(nn.Module):
    """Parallel convolutions of several dilations and the image's mean, joined by a 1x1 convolution.

    Each is without bias and has a norm and a ReLU. The mean of a picture is one value a channel, and BatchNorm over a
    batch of few such values says little of them: of two it leaves signs, of one nothing.

    Args:
        channels: of the map that comes in.
        width: channels of each branch, and of the map that goes out.
        dilations: of the branches; 1 is a 1x1 convolution, the others are 3x3.
        dropout: after the last ReLU.
        image_norm: of the image's mean: "layer" over its channels, the same for any batch [our choice], or "batch", as
            DeepLabv3 has it and published weights need it; that one is trained with two images a step or more.

    Raises:
        ValueError: in training, a batch of one with `image_norm="batch"`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        dilations: tuple[int, ...],
        *,
        dropout: float = 0.0,
        image_norm: ImageNorm = "layer",
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(channels, width, size=1 if dilation == 1 else 3, dilation=dilation))
            for dilation in dilations
        )
        norm = {"layer": LayerNorm2d, "batch": nn.BatchNorm2d}[image_norm]
        self.image = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU()
        )
        self.project = nn.Sequential(*conv_norm_relu((len(dilations) + 1) * width, width, size=1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, width, H, W)."""
        norm = self.image[2]
        if isinstance(norm, nn.BatchNorm2d) and norm.training and x.shape[0] == 1:  # len would fix an exported batch
            raise ValueError(
                "image_norm='batch': a batch of one image has no statistics to train with; expected two images or "
                "more, or image_norm='layer'"
            )
        seen = [branch(x) for branch in self.branches]
        return self.project(torch.cat([*seen, self.image(x).expand_as(seen[0])], dim=1))
