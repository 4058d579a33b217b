"""Pixel decoders: multi-scale deformable attention over stages (Mask2Former's), in two forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from magnet_fast import ops
from magnet_fast.models.config import HeadConfig, Shapes
from magnet_fast.models.position import sine_position

Level = tuple[Tensor, tuple[int, int]]
"""Tokens (B, H·W, C) of a map, and its (H, W)."""


class PixelDecoderConfig(HeadConfig):
    """What heads with a pixel decoder have in common; their `pixels` are its mask features."""

    width: int = Field(256, gt=0)
    num_heads: int = Field(8, gt=0)
    points: int = Field(4, gt=0, description="sampling points per level and head")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4 and of num_heads={self.num_heads}")
        return self

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.width


class LevelMixer(nn.Module):
    """Maps to one width, mixed across all levels by deformable attention.

    Args:
        channels: of the maps, from the finest to the coarsest.
        width: C of what comes out.
        num_heads, points: of the deformable attention; points are a level and head.
        layers: how many.
        feedforward: width inside a layer's feed-forward network.
    """

    def __init__(
        self, channels: tuple[int, ...], *, width: int, num_heads: int, points: int, layers: int, feedforward: int
    ) -> None:
        super().__init__()
        coarse_first = tuple(reversed(channels))
        self.input_proj = nn.ModuleList(nn.Conv2d(c, width, 1) for c in coarse_first)
        self.input_norm = nn.ModuleList(group_norm(width) for _ in coarse_first)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.level_embed = nn.Parameter(torch.randn(len(channels), width))
        self.layers = nn.ModuleList(
            DeformableLayer(width, num_heads, len(channels), points, feedforward) for _ in range(layers)
        )

    def mix(self, maps: list[Tensor]) -> list[Level]:
        """Channels-last maps, the finest first, to levels, the coarsest first, as in the sequence that layers read."""
        shapes, tokens, positions = [], [], []
        for level, feature in enumerate(reversed(maps)):
            projected = self.input_norm[level](self.input_proj[level](feature.permute(0, 3, 1, 2)))
            shapes.append(tuple(projected.shape[2:]))
            tokens.append(projected.flatten(2).transpose(1, 2))
            position = sine_position(*shapes[level], projected.shape[1], projected.device, projected.dtype)
            positions.append(position + self.level_embed[level])
        x, position = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        reference = pixel_centres(shapes, x.device)
        for layer in self.layers:
            x = layer(x, position, reference, shapes)
        return list(zip(x.split([height * width for height, width in shapes], dim=1), shapes, strict=True))


class PixelDecoder(LevelMixer):
    """All stages mixed; mask features are made of the finest level (MagNet's form)."""

    def __init__(self, channels: tuple[int, ...], *, width: int, **mixing: int) -> None:
        super().__init__(channels, width=width, **mixing)
        self.mask_features = nn.Conv2d(width, width, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Level], Tensor]:
        """Channels-last maps, the finest first, to (levels, mask features (B, width, h, w) at the finest map)."""
        levels = self.mix(maps)
        return levels, self.mask_features(as_map(levels[-1]))


class PyramidPixelDecoder(LevelMixer):
    """All stages but the finest mixed; mask features are made of that one and the level above it, as in a feature
    pyramid (Mask2Former's own form; RefSegformer's and ReLA's)."""

    def __init__(self, channels: tuple[int, ...], *, width: int, **mixing: int) -> None:
        finest, *mixed = channels
        super().__init__(tuple(mixed), width=width, **mixing)
        self.lateral, self.lateral_norm = nn.Conv2d(finest, width, 1, bias=False), group_norm(width)
        self.smooth, self.smooth_norm = nn.Conv2d(width, width, 3, padding=1, bias=False), group_norm(width)
        self.mask_features = nn.Conv2d(width, width, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Level], Tensor]:
        """As `PixelDecoder`; levels are those that were mixed."""
        finest, *mixed = maps
        levels = self.mix(mixed)
        y = self.lateral_norm(self.lateral(finest.permute(0, 3, 1, 2)))
        y = y + F.interpolate(as_map(levels[-1]), size=y.shape[2:], mode="bilinear", align_corners=False)
        return levels, self.mask_features(F.relu(self.smooth_norm(self.smooth(y))))


def as_map(level: Level) -> Tensor:
    """(B, C, H, W)"""
    tokens, shape = level
    return tokens.transpose(1, 2).unflatten(2, shape)


def group_norm(width: int) -> nn.GroupNorm:
    """Of 32 groups, or as many below as divide the width."""
    return nn.GroupNorm(math.gcd(32, width), width)


class DeformableLayer(nn.Module):
    """Post-norm encoder layer: deformable attention, then a ReLU feed-forward network."""

    is_repeated_layer = True

    def __init__(self, width: int, num_heads: int, levels: int, points: int, feedforward: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, num_heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        tokens = self.norm1(tokens + self.attention(tokens, position, reference, shapes))
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


class DeformableAttention(nn.Module):
    """Self-attention of the flattened pyramid on `ops.fused_deformable_attention` (Zhu et al., Deformable DETR).

    tokens and position are (B, ΣHₗWₗ, C); every token samples `points` places a level and head around itself.
    """

    def __init__(self, width: int, num_heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.num_heads, self.levels, self.points = num_heads, levels, points
        self.sampling_offsets = nn.Linear(width, num_heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, num_heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._initialise()

    def _initialise(self) -> None:
        # Deformable DETR's start: head i looks in direction i, point k at k + 1 pixels, all points equally.
        nn.init.zeros_(self.sampling_offsets.weight)
        device = self.sampling_offsets.weight.device
        angles = torch.arange(self.num_heads, device=device) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, device=device)
        offsets = direction[:, None, None, :] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        batch, count, width = tokens.shape
        query = tokens + position
        grid = (batch, count, self.num_heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*grid, 2)  # in pixels of the sampled level
        logits = self.attention_weights(query).view(grid)
        value = self.value_proj(tokens).view(batch, count, self.num_heads, width // self.num_heads)
        # Low precision takes float32 reference points: 8 bits do not place a pixel on a map of 60 columns.
        reference = reference.to(torch.promote_types(reference.dtype, value.dtype))
        return self.output_proj(ops.fused_deformable_attention(value, shapes, reference, offsets, logits))


def pixel_centres(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(ΣHₗWₗ, 2) pixel centres of all levels as (x, y) in [0, 1]."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        centres.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    return torch.cat(centres)
