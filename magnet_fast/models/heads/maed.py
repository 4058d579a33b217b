"""FSFI's head: neighbouring maps are compared, and what coarser ones leave out enters the finer ones again.

After Yang et al., "Referring Image Segmentation With Fine-Grained Semantic Funneling Infusion" (TNNLS 2024), as
released (multiscale attention-enhanced decoder, MAED).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.encoders.clip_resnet import conv_norm_relu
from magnet_fast.models.fusion.neck import enlarge


@part
class MaedConfig(HeadConfig):
    """Details between neighbouring maps, then coarse to fine."""

    kind: Literal["maed"] = "maed"
    width: int = Field(64, gt=0, description="channels of everything inside")

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.width

    def check(self, shapes: Shapes) -> None:
        if len(shapes.channels) < 3:
            raise ValueError(f"head: maed reads three maps or more; this fusion gives {len(shapes.channels)}")

    def build(self, shapes: Shapes) -> Maed:
        return Maed(shapes, self)


class Maed(Head):
    """Of N maps, finest first, the details of neighbours make N - 1 maps, those of theirs N - 2, and so on to one.

    Every finer map then takes up all details at its place, and the sums are added up from coarse to fine. The two
    coarsest of these sums share a convolution, and the coarsest map enters by one of its own, both as released. The
    mask has the finest map's size.
    """

    def __init__(self, shapes: Shapes, config: MaedConfig) -> None:
        super().__init__()
        width, maps = config.width, len(shapes.channels)
        self.pixel_channels = width
        self.reduce = nn.ModuleList(_block(channels, width) for channels in shapes.channels)
        self.rows = nn.ModuleList(
            nn.ModuleList(DetailEnhancement(width) for _ in range(count)) for count in range(maps - 1, 0, -1)
        )
        self.top = _block(width, width)
        self.levels = nn.ModuleList(_block(width, width) for _ in range(maps - 2))
        self.coarsest = _block(shapes.channels[-1], width)
        self.outputs = nn.ModuleList(_block(width, width) for _ in range(maps - 2))
        self.classify = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, features: Features) -> Prediction:
        maps = [x.permute(0, 3, 1, 2) for x in features.maps]
        row = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        sums = row[:-1]
        for details in self.rows:
            if len(details) == 1:
                row = [row[0], self.top(row[1])]
            row = [enhance(high, low) for enhance, low, high in zip(details, row[:-1], row[1:], strict=True)]
            sums = [total + detail for total, detail in zip(sums, row, strict=False)] + sums[len(row) :]
        levels = [level(total) for level, total in zip([*self.levels, self.levels[-1]], sums, strict=True)]
        x = self.coarsest(maps[-1])
        for output, level in zip(reversed(self.outputs), reversed(levels[1:]), strict=True):
            x = output(enlarge(x, level.shape[2:]) + level)
        pixels = enlarge(x, levels[0].shape[2:]) + levels[0]
        mask = self.classify(pixels)[:, 0]
        return Prediction(mask, pixels=pixels, words=features.words, aligned_corners=False)


class DetailEnhancement(nn.Module):
    """What a finer map has and a coarser one has not: (1 - sigmoid(coarse)) · fine, convolved (FSFI's DeEh).

    forward(high (B, C, h, w), low (B, C, H, W)) returns (B, C, H, W); high is the coarser one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = _block(width, width)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        return self.block((1 - torch.sigmoid(enlarge(high, low.shape[2:]))) * low)


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*conv_norm_relu(channels, width))
