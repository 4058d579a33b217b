"""Superpixels as visual words: each becomes one token, and the tokens meet the sentence instead of the pixels.

In the style of a semantic superpixel projector (arXiv 2509.13676), of which only the abstract is public. Stated:
regions are compressed to one visual token each, with an embedding of their geometry and position, and an aggregator
keeps the detail inside and the context outside. Formulas and sizes are our choice; its language model of billions of
parameters is not taken, a transformer of a few layers reads the tokens here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.base import LateFusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.joint import JointLayer
from magnet_fast.models.fusion.neck import enlarge
from magnet_fast.models.position import line_position

SUPERPIXELS = "superpixels"
"""In the context: integer (B, H, W) over the image, of any size; what is not in 0 … segments - 1 belongs to none."""
_COARSE = 16  # stride of the map that superpixels gather
_OCTAVES = 4  # frequencies at which geometry is written, 1 to 8 half turns over the picture
_GEOMETRY = 8  # numbers: centre, extent, second moments, area


@part
class SuperpixelConfig(FusionConfig):
    """A token for each superpixel; the head gets the finest map and, as its token, what was asked for."""

    kind: Literal["superpixel"] = "superpixel"
    width: int = Field(256, gt=0, multiple_of=4)
    segments: int = Field(64, gt=0, le=255, description="the most superpixels of an image")
    num_heads: int = Field(8, gt=0)
    layers: int = Field(3, gt=0)
    feedforward: int = Field(1024, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> SuperpixelConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return (self.width,)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return image.strides[:1]

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        return (self.width,)

    def build(self, image: ImageConfig, text: TextConfig) -> SuperpixelFusion:
        return SuperpixelFusion(self, image, text)


class SuperpixelFusion(LateFusion):
    """Gives one map (B, H, W, width), each pixel with its superpixel's token added, and the query (B, 1, width)."""

    needs = (SUPERPIXELS,)

    def __init__(self, config: SuperpixelConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        width, self.segments, self.stages = config.width, config.segments, len(image.channels)
        coarse = [i for i, stride in enumerate(image.strides) if stride >= _COARSE]
        self.first_coarse = coarse[0] if coarse else self.stages - 1
        self.lateral = nn.ModuleList(nn.Linear(channels, width) for channels in image.channels)
        self.norm = nn.LayerNorm(width)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.aggregate = Aggregator(width)
        self.geometry = nn.Sequential(nn.Linear(2 * _OCTAVES * _GEOMETRY, width), nn.GELU(), nn.Linear(width, width))
        self.words = nn.Linear(text.width, width)
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(
            JointLayer(width, config.num_heads, config.feedforward, config.dropout) for _ in range(config.layers)
        )
        self.token_norm = nn.LayerNorm(width)

    def look(self, maps: list[Tensor]) -> list[Tensor]:
        """The map that superpixels gather, of stride 16, and that of the pixels, the finest; (B, h, w, width) both."""
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        coarse = _summed(maps[self.first_coarse :])
        pixels = self.norm(_summed([*maps[: self.first_coarse], coarse]))
        return [coarse, self.smooth(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)]

    def join(self, seen: list[Tensor], words: Words, context: Mapping[str, Tensor]) -> Step:
        coarse, pixels = seen
        labels = context[SUPERPIXELS]
        if labels.is_floating_point() or labels.ndim != 3 or len(labels) != len(coarse):
            raise ValueError(
                f"context[{SUPERPIXELS!r}] is {tuple(labels.shape)} of {labels.dtype}; expected integers "
                f"(B, H, W), B that of the image, {len(coarse)}"
            )
        gathered = members(labels, self.segments, coarse.shape[1:3])
        painted = members(labels, self.segments, pixels.shape[1:3])
        there = gathered.flatten(2).any(dim=2)
        tokens = self.aggregate(coarse.flatten(1, 2), gathered.flatten(2))
        exact = torch.promote_types(coarse.dtype, torch.float32)  # bfloat16 does not count to 300
        tokens = tokens + self.geometry(written(geometry(painted.to(exact))).to(tokens.dtype))
        query = self.query.expand(len(tokens), 1, -1)
        tokens = torch.cat([tokens, self.words(words.features), query], dim=1)
        count, width = words.features.shape[1], tokens.shape[2]
        place = torch.cat(  # superpixels know their place, and the query has none
            [tokens.new_zeros(self.segments, width), line_position(count, width, tokens), tokens.new_zeros(1, width)]
        )
        mask = torch.cat([there, words.mask, torch.ones_like(there[:, :1])], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, place, mask)
        tokens, _, query = self.token_norm(tokens).split([self.segments, count, 1], dim=1)
        tokens = tokens * there[..., None].to(tokens.dtype)
        output = pixels + torch.einsum("bshw,bsc->bhwc", painted.to(tokens.dtype), tokens)
        return Step(output, output, words, query)


class Aggregator(nn.Module):
    """A token for each superpixel: its mean, what is salient in it, and the mean of the whole image.

    forward(x (B, P, C), inside (B, S, P) bool) returns (B, S, C). A superpixel without a pixel has the context alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.salience = nn.Linear(width, 1)
        self.output = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        weights = inside.to(x.dtype)
        mean = weights @ x / weights.sum(dim=2, keepdim=True).clamp(min=1)
        scores = self.salience(x).transpose(1, 2)
        scores = scores.masked_fill(~inside, torch.finfo(scores.dtype).min)
        detail = (scores.softmax(dim=2) * weights) @ x
        context = x.mean(dim=1, keepdim=True).expand_as(mean)
        return self.output(torch.cat([mean, detail, context], dim=-1))


def members(labels: Tensor, segments: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """Which superpixel the middle of each of a map's pixels belongs to: labels (B, H, W) to bool (B, S, h, w)."""
    rows, columns = (
        ((torch.arange(side, device=labels.device) + 0.5) * (whole / side)).long()
        for side, whole in zip(size, labels.shape[1:], strict=True)
    )
    sampled = labels[:, rows[:, None], columns]
    return sampled[:, None] == torch.arange(segments, device=labels.device)[:, None, None]


def geometry(inside: Tensor) -> Tensor:
    """Where superpixels lie and how they are spread: (B, S, h, w) of 0 and 1 to (B, S, 8).

    Centre x and y, width and height, variances of x and y, their covariance, the area; the image's sides are 1. Zeros
    for one without a pixel.
    """
    height, width = inside.shape[2:]
    y = (torch.arange(height, device=inside.device, dtype=inside.dtype) + 0.5) / height
    x = (torch.arange(width, device=inside.device, dtype=inside.dtype) + 0.5) / width
    rows, columns = inside.sum(dim=3), inside.sum(dim=2)  # (B, S, h), (B, S, w)
    area = rows.sum(dim=2)
    count = area.clamp(min=1)
    centre_x, centre_y = columns @ x / count, rows @ y / count
    spread_x = (columns * (x - centre_x[..., None]).square()).sum(dim=2) / count
    spread_y = (rows * (y - centre_y[..., None]).square()).sum(dim=2) / count
    together = ((inside @ x) * (y - centre_y[..., None])).sum(dim=2) / count  # sums of y - centre_y are 0
    extent_x, extent_y = (columns > 0).to(x.dtype).mean(dim=2), (rows > 0).to(x.dtype).mean(dim=2)
    return torch.stack(
        [centre_x, centre_y, extent_x, extent_y, spread_x, spread_y, together, area / (height * width)], dim=-1
    )


def written(numbers: Tensor) -> Tensor:
    """(…, N) to sines and cosines at `_OCTAVES` frequencies, (…, 2 · _OCTAVES · N)."""
    octaves = torch.arange(_OCTAVES, device=numbers.device, dtype=numbers.dtype)
    angles = (numbers[..., None] * (math.pi * 2**octaves)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _summed(maps: list[Tensor]) -> Tensor:
    """Maps (B, hᵢ, wᵢ, C) at the size of the first."""
    first, *others = maps
    for other in others:
        first = first + enlarge(other.permute(0, 3, 1, 2), first.shape[1:3]).permute(0, 2, 3, 1)
    return first
