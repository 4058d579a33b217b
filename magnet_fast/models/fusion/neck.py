"""CRIS's neck: the sentence meets the coarsest map, and three maps become one (Wang et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.base import LateFusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.encoders.clip_resnet import conv_norm_relu

_STAGES = 3


@part
class NeckConfig(FusionConfig):
    """Three maps to one, of the second one's stride and `widths[1]` channels."""

    kind: Literal["neck"] = "neck"
    widths: tuple[int, int, int] = Field((256, 512, 1024), description="of the finest, middle and coarsest map inside")

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if len(image.channels) != _STAGES:
            raise ValueError(f"fusion: neck joins {_STAGES} maps; the image encoder has {len(image.channels)}")

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return (self.widths[1],)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return (image.strides[1],)

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        return (None,)

    def build(self, image: ImageConfig, text: TextConfig) -> NeckFusion:
        return NeckFusion(self, image, text)


class NeckFusion(LateFusion):
    """Gives one map (B, H, W, C)."""

    stages = _STAGES

    def __init__(self, config: NeckConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        self.neck = Neck(image.channels, text.sentence_width, config.widths)

    def join(self, seen: list[Tensor], words: Words, context: Mapping[str, Tensor]) -> Step:
        joined = self.neck(*(one.permute(0, 3, 1, 2) for one in seen), words.sentence)
        joined = joined.permute(0, 2, 3, 1)
        return Step(joined, joined, words)


class Neck(nn.Module):
    """forward(fine, middle, coarse (B, C, h, w), sentence (B, E)) returns (B, C, h, w) of the middle one's size."""

    def __init__(self, channels: tuple[int, ...], sentence_width: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        fine, middle, coarse = channels
        narrow, width, wide = widths
        self.sentence = nn.Sequential(nn.Linear(sentence_width, wide, bias=False), nn.BatchNorm1d(wide), nn.ReLU())
        self.coarse = nn.Sequential(*conv_norm_relu(coarse, wide, size=1))
        self.coarse_norm = nn.BatchNorm2d(wide)
        self.middle = nn.Sequential(*conv_norm_relu(middle, width))
        self.middle_join = nn.Sequential(*conv_norm_relu(width + wide, width, size=1))
        self.fine = nn.Sequential(*conv_norm_relu(fine, narrow))
        self.fine_join = nn.Sequential(*conv_norm_relu(narrow + width, width, size=1))
        self.coarse_out = nn.Sequential(*conv_norm_relu(wide, width))
        self.middle_out = nn.Sequential(*conv_norm_relu(width, width))
        self.fine_out = nn.Sequential(*conv_norm_relu(width, width))
        self.join = nn.Sequential(*conv_norm_relu(3 * width, width, size=1))
        self.place = nn.Sequential(*conv_norm_relu(width + 2, width))
        self.last = nn.Sequential(*conv_norm_relu(width, width))

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor, sentence: Tensor) -> Tensor:
        size = middle.shape[2:]
        f5 = F.relu(self.coarse_norm(self.coarse(coarse) * self.sentence(sentence)[:, :, None, None]))
        f4 = self.middle_join(torch.cat([self.middle(middle), enlarge(f5, size)], dim=1))
        f3 = F.avg_pool2d(self.fine(fine), 2, ceil_mode=True)
        f3 = self.fine_join(torch.cat([f3, f4], dim=1))
        joined = [self.fine_out(f3), self.middle_out(f4), enlarge(self.coarse_out(f5), size)]
        joined = self.join(torch.cat(joined, dim=1))
        return self.last(self.place(torch.cat([joined, _coordinates(joined)], dim=1)))


def enlarge(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _coordinates(like: Tensor) -> Tensor:
    """(B, 2, h, w): columns, then rows, from -1 to 1."""
    height, width = like.shape[2:]
    columns = torch.linspace(-1, 1, width, device=like.device, dtype=like.dtype).expand(height, width)
    rows = torch.linspace(-1, 1, height, device=like.device, dtype=like.dtype)[:, None].expand(height, width)
    return torch.stack([columns, rows]).expand(like.shape[0], -1, -1, -1)
