"""A late fusion for photographs: pixels first say which box their object has, then words come in [our own, no paper].

Every pixel of an object says the same middle and size. What is asked of whole objects, the leftmost, the largest, is
then asked of each pixel, and gets one answer all over an object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import LateFusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.neck import enlarge

_STAGES = 4
_OCTAVES = 4  # frequencies at which a box is written, 1 to 8 half turns over the picture


@part
class ObjectsConfig(FusionConfig):
    """Maps of strides 4, 8, 16 and 32 to one of stride 4."""

    kind: Literal["objects"] = "objects"
    width: int = Field(128, gt=0, description="of the map of stride 16, on which words and pixels meet")
    middle: int = Field(64, gt=0, description="of the map of stride 8")
    fine: int = Field(16, gt=0, description="of the map of stride 4, which the head gets")
    num_heads: int = Field(4, gt=0)
    look_layers: int = Field(1, ge=0, description="of self-attention, before words come")
    layers: int = Field(2, gt=0, description="in which pixels read the words, then one another")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> ObjectsConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if len(image.channels) != _STAGES or image.in_stream:
            raise ValueError(
                f"fusion: objects joins {_STAGES} maps of an encoder that makes them at once (timm); this one has "
                f"{len(image.channels)}"
            )

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return (self.fine + 1,)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return image.strides[:1]

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        return (None,)

    def build(self, image: ImageConfig, text: TextConfig) -> ObjectsFusion:
        return ObjectsFusion(self, image, text)


class ObjectsFusion(LateFusion):
    """Gives one map (B, H/4, W/4, fine + 1): the image's own fine map, each channel weighted by what words and pixels
    agreed on, and one channel of that alone.

    `look` gives maps (B, C, h, w) of strides 16, 8 and 4, and the boxes (B, 4, h, w) at stride 8: middle x and y, width
    and height, shares of the image from 0 to 1.
    """

    stages = _STAGES

    def __init__(self, config: ObjectsConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        width, middle, fine = config.width, config.middle, config.fine
        self.seen = Pyramid(image.channels, config)
        self.words = nn.Linear(text.width, width)
        self.sentence = nn.Linear(text.width, 2 * middle)
        self.layers = nn.ModuleList(
            Layer(width, config.num_heads, config.dropout, words=True) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.down = nn.Conv2d(width, middle, 1)
        self.mix = conv_norm_gelu(middle, middle)
        self.kernel = nn.Conv2d(middle, fine + 1, 1)

    def look(self, maps: list[Tensor]) -> list[Tensor]:
        return self.seen([x.permute(0, 3, 1, 2) for x in maps])

    def join(self, seen: list[Tensor], words: Words, context: Mapping[str, Tensor]) -> Step:
        coarse, middle, fine, _ = seen
        x, given = coarse.flatten(2).transpose(1, 2), self.words(words.features)
        for layer in self.layers:
            x = layer(x, given, words.mask)
        x = self.down(self.norm(x).transpose(1, 2).unflatten(2, coarse.shape[2:]))
        scale, shift = self.sentence(words.sentence)[:, :, None, None].chunk(2, dim=1)
        x = middle * (1 + scale) + shift + enlarge(x, middle.shape[2:])
        kernel = enlarge(self.kernel(x + self.mix(x)), fine.shape[2:])
        output = torch.cat([fine * kernel[:, :-1], kernel[:, -1:]], dim=1).permute(0, 2, 3, 1)
        return Step(output, output, words)


class Pyramid(nn.Module):
    """Four maps (B, Cᵢ, h, w), the finest first, to `ObjectsFusion.look`'s."""

    def __init__(self, channels: tuple[int, ...], config: ObjectsConfig) -> None:
        super().__init__()
        width, middle, fine = config.width, config.middle, config.fine
        self.lateral4, self.lateral8 = nn.Conv2d(channels[0], fine, 1), nn.Conv2d(channels[1], middle, 1)
        self.lateral16, self.lateral32 = nn.Conv2d(channels[2], width, 1), nn.Conv2d(channels[3], width, 1)
        self.place = nn.Conv2d(4 * _OCTAVES, width, 1)
        self.layers = nn.ModuleList(
            Layer(width, config.num_heads, config.dropout, words=False) for _ in range(config.look_layers)
        )
        self.down16, self.down8 = nn.Conv2d(width, middle, 1), nn.Conv2d(middle, fine, 1)
        self.mix8, self.mix4 = conv_norm_gelu(middle, middle), conv_norm_gelu(fine, fine)
        self.box = nn.Conv2d(middle, 4, 1)
        self.box16, self.box8 = nn.Conv2d(8 * _OCTAVES, width, 1), nn.Conv2d(8 * _OCTAVES, middle, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        x4, x8, x16, x32 = maps
        coarse = self.lateral16(x16) + enlarge(self.lateral32(x32), x16.shape[2:])
        size = coarse.shape[2:]
        coarse = coarse + self.place(written(places(*size, coarse)[None]))
        tokens = coarse.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        coarse = tokens.transpose(1, 2).unflatten(2, size)
        middle = self.mix8(self.lateral8(x8) + enlarge(self.down16(coarse), x8.shape[2:]))
        fine = self.mix4(self.lateral4(x4) + enlarge(self.down8(middle), x4.shape[2:]))
        offset, extent = self.box(middle).chunk(2, dim=1)
        boxes = torch.cat([places(*middle.shape[2:], middle) + offset, extent.sigmoid()], dim=1)
        # What is said of boxes is read as given: only their own loss moves them.
        said = boxes.detach()
        coarse = coarse + self.box16(written(F.adaptive_avg_pool2d(said, size)))
        return [coarse, middle + self.box8(written(said)), fine, boxes]


class Layer(nn.Module):
    """Pixels read the words, where there are any, then one another, then a feed-forward network; pre-norm."""

    is_repeated_layer = True

    def __init__(self, width: int, num_heads: int, dropout: float, *, words: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.words = words
        if words:
            self.norm_words = nn.LayerNorm(width)
            self.query = nn.Linear(width, width)
            self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
            self.scale_shift = nn.Linear(width, 2 * width)
            nn.init.zeros_(self.scale_shift.weight)
            nn.init.zeros_(self.scale_shift.bias)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feedforward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, words: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, P, C), words (B, T, C) and their mask (B, T) to (B, P, C)."""
        if self.words:
            y = self.norm_words(x)
            attended, _ = ops.cross_modal_attention(
                self.query(y), self.key(words), self.value(words), text_mask=mask, num_heads=self.num_heads
            )
            scale, shift = self.scale_shift(F.gelu(attended)).chunk(2, dim=-1)
            x = x + self.dropout(y * scale + shift)
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.output(attended))
        return x + self.dropout(self.feedforward(self.norm2(x)))


def conv_norm_gelu(inside: int, channels: int) -> nn.Sequential:
    """Convolution 3×3, a norm over groups of eight channels, GELU."""
    return nn.Sequential(
        nn.Conv2d(inside, channels, 3, padding=1, bias=False), nn.GroupNorm(max(1, channels // 8), channels), nn.GELU()
    )


def places(height: int, width: int, like: Tensor) -> Tensor:
    """(2, h, w): x and y of the middles of a map's pixels, from 0 to 1."""
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)])


def written(numbers: Tensor) -> Tensor:
    """(…, C, h, w) from 0 to 1 to sines and cosines at `_OCTAVES` frequencies, (…, 2 · _OCTAVES · C, h, w)."""
    angles = [numbers * (math.pi * 2**octave) for octave in range(_OCTAVES)]
    return torch.cat([*(angle.sin() for angle in angles), *(angle.cos() for angle in angles)], dim=-3)
