"""RISAM's fusion: maps of a plain transformer become one, and pixels and words attend to each other.

After Zhang et al., "RISAM: Referring Image Segmentation via Mutual-Aware Attention Features" (arXiv 2311.15727). Stated
in what could be read of it: shallow, middle and deep maps are enhanced to one; blocks of two parallel branches follow,
in which pixels attend to words (vision-guided) and words to pixels (language-guided), by one similarity and its
transpose; words carry position encodings. All else, layers, norms, widths and counts, is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.layers import LayerNorm2d, LayerScale2d, trunc_normal_
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import LateFusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.position import RandomPosition

_MAPS = 3


@part
class MutualConfig(FusionConfig):
    """Three maps of one stride to one map and vision-aware words, both of `width` channels [our choice]."""

    kind: Literal["mutual"] = "mutual"
    width: int = Field(256, gt=0, multiple_of=2)
    num_heads: int = Field(8, gt=0)
    layers: int = Field(3, ge=0, description="mutual-aware attention blocks")
    feedforward: int = Field(1024, gt=0)
    max_words: int = Field(77, gt=0, description="positions that words may have")
    language_guided: bool = Field(
        True, description="words attend to pixels; without, the blocks leave them as they are"
    )

    @model_validator(mode="after")
    def _divisible(self) -> MutualConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if len(image.strides) != _MAPS or len(set(image.strides)) != 1:
            raise ValueError(
                f"fusion: mutual joins {_MAPS} maps of one stride; the image encoder's are {image.strides}"
            )

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return (self.width,)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return image.strides[:1]

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        return (self.width,)

    def build(self, image: ImageConfig, text: TextConfig) -> MutualFusion:
        return MutualFusion(self, image, text)


class MutualFusion(LateFusion):
    """Gives one map (B, H, W, C), with vision-aware words as tokens; the text encoder's words go on as they came.

    The enhanced map is the image's alone.
    """

    stages = _MAPS

    def __init__(self, config: MutualConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.enhance = FeatureEnhancement(image.channels, width)
        self.word_in = nn.Linear(text.width, width)
        self.word_positions = nn.Parameter(torch.empty(config.max_words, width))
        trunc_normal_(self.word_positions, std=0.02)
        self.place = RandomPosition(width)
        self.layers = nn.ModuleList(MutualAttention(config) for _ in range(config.layers))

    def look(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.enhance(*maps)]

    def join(self, seen: list[Tensor], words: Words, context: Mapping[str, Tensor]) -> Step:
        count = words.features.shape[1]
        if count > len(self.word_positions):
            raise ValueError(f"text.ids holds {count} tokens; this fusion has {len(self.word_positions)} positions")
        (pixels,) = seen
        size, pixels = pixels.shape[1:3], pixels.flatten(1, 2)
        tokens = self.word_in(words.features) + self.word_positions[:count]
        place = self.place(*size, pixels)
        for layer in self.layers:
            pixels, tokens = layer(pixels, place, tokens, words.mask)
        pixels = pixels.unflatten(1, size)
        return Step(pixels, pixels, words, tokens)


class FeatureEnhancement(nn.Module):
    """The neck of the deepest map, plus what all three say together behind a gate that starts closed.

    With the gate closed it is the map that SAM's mask decoder was trained on [our choice].
    forward(shallow, middle, deep (B, H, W, Cᵢ)) returns (B, H, W, width).
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        shallow, middle, deep = channels
        self.shallow, self.middle = (
            nn.Sequential(nn.Conv2d(given, width, 1, bias=False), LayerNorm2d(width)) for given in (shallow, middle)
        )
        self.neck = SamNeck(deep, width)
        self.mix = nn.Sequential(
            nn.Conv2d(3 * width, width, 1, bias=False),
            LayerNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.gate = LayerScale2d(width, init_values=0.0)

    def forward(self, shallow: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        shallow, middle, deep = (x.permute(0, 3, 1, 2) for x in (shallow, middle, deep))
        deep = self.neck(deep)
        together = torch.cat([self.shallow(shallow), self.middle(middle), deep], dim=1)
        return (deep + self.gate(self.mix(together))).permute(0, 2, 3, 1)


class SamNeck(nn.Module):
    """SAM's: convolutions of sizes 1 and 3 without bias, a norm over the channels after each.

    forward takes (B, C, H, W) and returns (B, width, H, W).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = LayerNorm2d(width)
        self.smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.smooth(self.norm1(self.narrow(x))))


class MutualAttention(nn.Module):
    """A block: by one similarity pixels read words and words read pixels, each with its own softmax and FFN; post-norm.

    That the transpose is taken of the similarity and not of the normalised weights is our reading.

    Args:
        config: of the fusion. Without `language_guided` words only answer.
    """

    is_repeated_layer = True

    def __init__(self, config: MutualConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.num_heads
        self.query, self.key, self.word_value, self.pixel_output = (nn.Linear(width, width) for _ in range(4))
        self.pixel_norm1, self.pixel_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pixel_feedforward = _feedforward(width, config.feedforward)
        self.language_guided = config.language_guided
        if self.language_guided:
            self.pixel_value, self.word_output = nn.Linear(width, width), nn.Linear(width, width)
            self.word_norm1, self.word_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.word_feedforward = _feedforward(width, config.feedforward)

    def forward(self, pixels: Tensor, place: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, P, C), their position encoding (P, C), words (B, T, C) and their mask (B, T), True for a word, to
        pixels and words of the same shapes."""
        to_pixels, to_words = ops.cross_modal_attention(
            self.query(pixels + place),
            self.key(words),
            self.word_value(words),
            image_value=self.pixel_value(pixels) if self.language_guided else None,
            text_mask=mask,
            num_heads=self.heads,
        )
        pixels = self.pixel_norm1(pixels + self.pixel_output(to_pixels))
        pixels = self.pixel_norm2(pixels + self.pixel_feedforward(pixels))
        if self.language_guided:
            words = self.word_norm1(words + self.word_output(to_words))
            words = self.word_norm2(words + self.word_feedforward(words))
        return pixels, words


def _feedforward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
