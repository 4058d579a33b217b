"""MagNet's fusion: an exchange between each image stage and a text slice, both ways.

MagNet, section 3.2 (there the Cross-modal Alignment Module), in two forms that share the pyramid: `pwam` (the released
models) and `xmha` (the paper). Both sides read the other's features from before the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.pixel_word import PWAM, Gate, TextPWAM
from magnet_fast.models.fusion.pwam import stage_heads
from magnet_fast.models.fusion.xmha import CrossModalityAttention


@part
class ExchangeConfig(FusionConfig):
    """An exchange after every stage from the first one on, through a pyramid of pooled levels."""

    kind: Literal["exchange"] = "exchange"
    form: Literal["pwam", "xmha"] = Field("pwam", description="as released, or as in the paper")
    masking: Literal["correct", "released"] = Field("correct", description="of padded words, form 'pwam' only")
    heads: int | tuple[int, ...] = Field(1, description="of every stage's PWAM, or a number for each stage")
    pyramid: tuple[int, ...] = Field((1, 2, 3, 6), description="sides of the pooled levels; () for none, an ablation")
    head_dim: int = Field(32, gt=0, description="channels per head, form 'xmha' only")
    dropout: float = Field(0.0, ge=0, lt=1)
    first: int = Field(0, ge=0, description="the first stage that exchanges; maps and words before it stay as they are")

    @model_validator(mode="after")
    def _known_combination(self) -> ExchangeConfig:
        if self.form == "xmha" and self.masking == "released":
            raise ValueError("masking='released' reproduces the released PWAM form; use it with form='pwam'")
        return self

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if self.first >= len(image.channels):
            raise ValueError(f"fusion.first={self.first}: the image encoder has {len(image.channels)} stages")
        stage_heads(self.heads, image.channels)
        for channels in image.channels:
            if self.pyramid and channels % len(self.pyramid):
                raise ValueError(
                    f"fusion.pyramid has {len(self.pyramid)} levels, which must divide a stage's {channels} channels"
                )

    def build(self, image: ImageConfig, text: TextConfig) -> Exchange:
        return Exchange(self, image, text)


class Exchange(Fusion):
    """An `ExchangeStage` for each of the image encoder's stages, from the first that exchanges."""

    def __init__(self, config: ExchangeConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        form = {"pwam": PWAMExchange, "xmha": XMHAExchange}[config.form]
        self.first, last = config.first, len(image.channels) - 1
        self.stages = nn.ModuleList(
            form(config, stage, channels, text.width, gated=image.in_stream and stage < last)
            for stage, channels in enumerate(image.channels)
            if stage >= config.first
        )

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        if i < self.first:
            return Step(x, x, words)
        output, stream, features = self.stages[i - self.first](x, words.features, words.mask)
        return Step(output, stream, Words(features, words.mask))


class PooledLevel(nn.Module):
    """Pixels averaged to p×p, mixed by a small channel MLP and reduced: (B, H, W, C) → (B, p², C/levels)."""

    def __init__(self, channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.expand = nn.Linear(channels, 4 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels, eps=1e-6)
        self.contract = nn.Linear(4 * channels, channels, bias=False)
        self.reduce = nn.Linear(channels, out_channels, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        pooled = averaged(feature, self.side)
        return self.reduce(F.gelu(self.contract(self.norm(self.expand(pooled)))))


class Mixer(nn.Sequential):
    """Pooled levels, upsampled, and full resolution, side by side, to the stage's output: Linear, norm, Linear, GELU.

    forward(levels [(B, p², c), ...], full (B, H·W, C), size (H, W)) returns (B, H, W, C).
    """

    def __init__(self, channels: int, in_channels: int) -> None:
        super().__init__(nn.Linear(in_channels, channels), nn.LayerNorm(channels), nn.Linear(channels, channels))

    def forward(self, levels: list[Tensor], full: Tensor, size: tuple[int, int]) -> Tensor:
        first, norm, last = self
        maps = [upsample(level, size) for level in levels]
        return F.gelu(last(norm(first(torch.cat([*maps, full.unflatten(1, size)], dim=-1)))))


class ExchangeStage(nn.Module):
    """What both forms share: pooled levels, upsampling, mixing, gates.

    forward(feature (B, H, W, C), words (B, T, D), word_mask (B, T) bool) returns
    (output (B, H, W, C) for the head, stream (B, H, W, C) for the next stage, words (B, T, D)).

    A form builds its attention in `build_attention`, and its `exchange` returns full resolution (B, P, C) and pooled
    levels for the mixer, then the residuals of the pixels and of the words.

    Args:
        gated: False where nothing reads the stream; it then passes as it is.
    """

    def __init__(self, config: ExchangeConfig, stage: int, channels: int, text_width: int, *, gated: bool) -> None:
        super().__init__()
        level_channels = channels // max(1, len(config.pyramid))
        self.pools = nn.ModuleList(PooledLevel(channels, level_channels, side) for side in config.pyramid)
        self.mixer = Mixer(channels, channels + level_channels * len(config.pyramid))
        self.image_gate = Gate(channels, "gelu") if gated else None
        self.text_gate = Gate(text_width, "relu")
        self.build_attention(config, stage, channels, level_channels, text_width)

    def build_attention(
        self, config: ExchangeConfig, stage: int, channels: int, level_channels: int, text_width: int
    ) -> None:
        raise NotImplementedError

    def exchange(
        self, feature: Tensor, words: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, feature: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = feature.shape[1:3]
        full, levels, image_residual, text_residual = self.exchange(feature, words, word_mask)
        output = self.mixer(levels, full, size)
        stream = feature
        if self.image_gate is not None:
            stream = self.image_gate(feature, image_residual.unflatten(1, size))
        return output, stream, self.text_gate(words, text_residual)


class PWAMExchange(ExchangeStage):
    """The released form: a PWAM per level, and a PWAM-like module for the words."""

    def build_attention(
        self, config: ExchangeConfig, stage: int, channels: int, level_channels: int, text_width: int
    ) -> None:
        heads = config.heads if isinstance(config.heads, int) else config.heads[stage]
        self.fusion = PWAM(channels, text_width, num_heads=heads, dropout=config.dropout)
        self.level_fusions = nn.ModuleList(
            PWAM(level_channels, text_width, num_heads=heads, dropout=config.dropout) for _ in config.pyramid
        )
        self.text_fusion = TextPWAM(text_width, channels, masking=config.masking)

    def exchange(
        self, feature: Tensor, words: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        pixels = feature.flatten(1, 2)
        levels = [
            fuse(pool(feature), words, word_mask) for pool, fuse in zip(self.pools, self.level_fusions, strict=True)
        ]
        residual = self.fusion(pixels, words, word_mask)
        return residual, levels, residual, self.text_fusion(words, pixels, word_mask)


class XMHAExchange(ExchangeStage):
    """The paper's form: each level exchanges both ways through one similarity; the words average their levels."""

    def build_attention(
        self, config: ExchangeConfig, stage: int, channels: int, level_channels: int, text_width: int
    ) -> None:
        def both_ways(width: int) -> CrossModalityAttention:
            inner = -(-width // config.head_dim) * config.head_dim
            return CrossModalityAttention(width, text_width, inner=inner, head_dim=config.head_dim)

        self.fusion = both_ways(channels)
        self.level_fusions = nn.ModuleList(both_ways(level_channels) for _ in config.pyramid)

    def exchange(
        self, feature: Tensor, words: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        pooled = [pool(feature) for pool in self.pools]
        pixels = feature.flatten(1, 2)
        image_residual, text_residual = self.fusion(pixels, words, word_mask)
        levels = []
        for level, fuse in zip(pooled, self.level_fusions, strict=True):
            update, word_update = fuse(level, words, word_mask)
            levels.append(level + update)
            text_residual = text_residual + word_update
        return pixels + image_residual, levels, image_residual, text_residual / (1 + len(levels))


def upsample(level: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, p², c) to (B, H, W, c), bilinear with aligned corners."""
    side = math.isqrt(level.shape[1])
    grid = level.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, size=tuple(size), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def averaged(feature: Tensor, side: int) -> Tensor:
    """(B, H, W, C) to (B, side², C): means over the bins of adaptive average pooling.

    Where PyTorch is asked for deterministic algorithms the sums are matrix products: the backward pass of
    `adaptive_avg_pool2d` adds with atomics on CUDA, and would raise.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(feature.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)
    rows, height = _bins(feature.shape[1], side, feature)
    columns, width = _bins(feature.shape[2], side, feature)
    sums = columns @ (rows @ feature.flatten(2)).unflatten(2, feature.shape[2:])
    return (sums / (height[:, None] * width)[..., None]).flatten(1, 2)


def _bins(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `size` positions each of `side` bins holds, 0 and 1 (side, size), and how many, (side,)."""
    bins, positions = torch.arange(side, device=like.device), torch.arange(size, device=like.device)
    first, end = bins * size // side, ((bins + 1) * size + side - 1) // side
    inside = (positions >= first[:, None]) & (positions < end[:, None])
    return inside.to(like.dtype), (end - first).to(like.dtype)
