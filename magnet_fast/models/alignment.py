"""The Cross-modal Alignment Module: one exchange between an image stage and a text slice.

MagNet, section 3.2, in two forms that share the pyramid: `pwam` (the released models) and `xmha` (the paper).
Both sides read the other's features from before the exchange.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._linear import linear, observed, plain_linear
from .config import AlignmentConfig
from .position import constants_outlive_call
from .project import project
from .pwam import PWAM, Gate, TextPWAM
from .xmha import CrossModalityAttention


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
        pooled = _average(feature, self.side)
        return self.reduce(project(self.contract, self.norm(self.expand(pooled)), activation="gelu"))


class Mixer(nn.Sequential):
    """Pooled levels, upsampled, and full resolution, side by side, to the stage's output: Linear, norm, Linear, GELU.

    forward(levels [(B, p², c), ...], full (B, H·W, C), size (H, W)) returns (B, H, W, C). Upsampling and the first
    Linear commute: its columns that meet the levels are applied to their few tokens, not to every pixel, and upsampling
    all of them is one product.
    """

    def __init__(self, channels: int, in_channels: int) -> None:
        super().__init__(nn.Linear(in_channels, channels), nn.LayerNorm(channels), nn.Linear(channels, channels))

    def forward(self, levels: list[Tensor], full: Tensor, size: tuple[int, int]) -> Tensor:
        first, norm, last = self
        known = plain_linear(first) and not observed(first)
        mixed = self._levels_first(levels, full, size) if known and levels else self._concatenated(levels, full, size)
        return project(last, norm(mixed), activation="gelu").unflatten(1, size)

    def _concatenated(self, levels: list[Tensor], full: Tensor, size: tuple[int, int]) -> Tensor:
        maps = [_upsample(level, size).flatten(1, 2) for level in levels]
        return self[0](torch.cat([*maps, full], dim=-1))

    def _levels_first(self, levels: list[Tensor], full: Tensor, size: tuple[int, int]) -> Tensor:
        *narrow, wide = self[0].weight.split([*(level.shape[2] for level in levels), full.shape[2]], dim=1)
        tokens = torch.cat([F.linear(level, weight) for level, weight in zip(levels, narrow, strict=True)], dim=1)
        sides = tuple(math.isqrt(level.shape[1]) for level in levels)
        made = _kept_upsampling if constants_outlive_call(tokens.device) else _upsampling
        upsampled = made(sides, tuple(size), tokens.device, tokens.dtype) @ tokens
        return linear(full, wide, self[0].bias, residual=upsampled)


class AlignmentModule(nn.Module):
    """What both forms share: pooled levels, upsampling, mixing, gates.

    forward(feature (B, H, W, C), words (B, T, D), word_mask (B, T) bool) returns
    (output (B, H, W, C) for the decoder, stream (B, H, W, C) for the next stage, words (B, T, D)).

    A form builds its attention in `_build_exchange`, and its `_exchange` returns full resolution (B, P, C) and pooled
    levels for the mixer, then the residuals of the pixels and of the words. It need not compute the words' where
    `words_listen` is False: their gate is closed, as in released checkpoints, and the text stream is plain BERT.
    """

    def __init__(self, config: AlignmentConfig, stage: int, channels: int, text_width: int) -> None:
        super().__init__()
        level_channels = channels // max(1, len(config.pyramid))
        self.pools = nn.ModuleList(PooledLevel(channels, level_channels, side) for side in config.pyramid)
        self.mixer = Mixer(channels, channels + level_channels * len(config.pyramid))
        self.image_gate = Gate(channels, "gelu")
        self.text_gate = Gate(text_width, "relu")
        self._build_exchange(config, stage, channels, level_channels, text_width)

    def forward(self, feature: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = feature.shape[1:3]
        words_listen = not self.text_gate.closed()
        full, levels, image_residual, text_residual = self._exchange(feature, words, word_mask, words_listen)
        output = self.mixer(levels, full, size)
        stream = self.image_gate(feature, image_residual.unflatten(1, size))
        return output, stream, self.text_gate(words, text_residual) if words_listen else words


class PWAMAlignment(AlignmentModule):
    """The released form: a PWAM per level, and a PWAM-like module for the words."""

    def _build_exchange(
        self, config: AlignmentConfig, stage: int, channels: int, level_channels: int, text_width: int
    ) -> None:
        heads, dropout = config.fusion_heads[stage], config.dropout
        self.fusion = PWAM(channels, text_width, num_heads=heads, dropout=dropout)
        self.level_fusions = nn.ModuleList(
            PWAM(level_channels, text_width, num_heads=heads, dropout=dropout) for _ in config.pyramid
        )
        self.text_fusion = TextPWAM(text_width, channels, masking=config.masking)

    def _exchange(
        self, feature: Tensor, words: Tensor, word_mask: Tensor, words_listen: bool
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        pixels = feature.flatten(1, 2)
        levels = [
            fuse(pool(feature), words, word_mask) for pool, fuse in zip(self.pools, self.level_fusions, strict=True)
        ]
        residual = self.fusion(pixels, words, word_mask)
        text_residual = self.text_fusion(words, pixels, word_mask) if words_listen else None
        return residual, levels, residual, text_residual


class XMHAAlignment(AlignmentModule):
    """The paper's form: each level exchanges both ways through one similarity; the words average their levels."""

    def _build_exchange(
        self, config: AlignmentConfig, stage: int, channels: int, level_channels: int, text_width: int
    ) -> None:
        def exchange(width: int) -> CrossModalityAttention:
            inner = -(-width // config.head_dim) * config.head_dim
            return CrossModalityAttention(width, text_width, inner=inner, head_dim=config.head_dim)

        self.fusion = exchange(channels)
        self.level_fusions = nn.ModuleList(exchange(level_channels) for _ in config.pyramid)

    def _exchange(
        self, feature: Tensor, words: Tensor, word_mask: Tensor, words_listen: bool
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        pooled = [pool(feature) for pool in self.pools]
        pixels = feature.flatten(1, 2)
        image_residual, text_residual = self.fusion(pixels, words, word_mask)
        levels = []
        for level, fuse in zip(pooled, self.level_fusions, strict=True):
            update, word_update = fuse(level, words, word_mask)
            levels.append(level + update)
            text_residual = text_residual + word_update
        return pixels + image_residual, levels, image_residual, text_residual / (1 + len(levels))


def build_alignment(config: AlignmentConfig, stage: int, channels: int, text_width: int) -> AlignmentModule:
    """The alignment module of one stage in the configured form."""
    form = {"pwam": PWAMAlignment, "xmha": XMHAAlignment}[config.kind]
    return form(config, stage, channels, text_width)


def _average(feature: Tensor, side: int) -> Tensor:
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
    """Which of ``size`` positions each of ``side`` bins holds, 0 and 1 (side, size), and how many, (side,)."""
    bins, positions = torch.arange(side, device=like.device), torch.arange(size, device=like.device)
    first, end = bins * size // side, ((bins + 1) * size + side - 1) // side
    inside = (positions >= first[:, None]) & (positions < end[:, None])
    return inside.to(like.dtype), (end - first).to(like.dtype)


def _upsample(level: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, p², c) to (B, H, W, c), bilinear with aligned corners."""
    side = math.isqrt(level.shape[1])
    grid = level.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, size=tuple(size), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def _upsampling(sides: tuple[int, ...], size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H·W, Σp²): the product with tokens of all levels is the sum of what :func:`_upsample` makes of each."""
    wide = torch.promote_types(dtype, torch.float32)
    maps = [_upsample(torch.eye(p * p, device=device, dtype=wide)[None], size) for p in sides]
    return torch.cat(maps, dim=-1).flatten(0, 2).to(dtype)


@lru_cache(maxsize=16)
def _kept_upsampling(sides: tuple[int, ...], size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # made during inference, it must still serve training
        return _upsampling(sides, size, device, dtype)
