"""The pixel decoder: multi-scale deformable attention over all four stages (Mask2Former's, as MagNet released it)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import _linear_chain
from ..ops._linear import linear
from ..ops._linear_chain import Step
from .config import MaskDecoderConfig
from .position import sine_position
from .project import project
from .tokenwise import tokenwise


class DeformableAttention(nn.Module):
    """Self-attention of the flattened pyramid on `ops.fused_deformable_attention` (Zhu et al., Deformable DETR).

    tokens and position are (B, ΣHₗWₗ, C); every token samples `points` places a level and head around itself. What
    comes out lies before `output_proj`, which is a token's own affair and left to the layer.
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
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
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
        offsets = project(self.sampling_offsets, query).view(*grid, 2)  # in pixels of the sampled level
        logits = project(self.attention_weights, query).view(grid)
        del query  # its memory is that of the values
        value = project(self.value_proj, tokens).view(batch, count, self.num_heads, width // self.num_heads)
        # Low precision takes float32 reference points: 8 bits do not place a pixel on a map of 60 columns.
        reference = reference.to(torch.promote_types(reference.dtype, value.dtype))
        return ops.fused_deformable_attention(value, shapes, reference, offsets, logits)


class DeformableLayer(nn.Module):
    """Post-norm encoder layer: deformable attention, then a ReLU feed-forward network."""

    def __init__(self, config: MaskDecoderConfig, levels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(config.width, config.num_heads, levels, config.points)
        self.norm1 = nn.LayerNorm(config.width)
        self.linear1 = nn.Linear(config.width, config.pixel_feedforward)
        self.linear2 = nn.Linear(config.pixel_feedforward, config.width)
        self.norm2 = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        attended = self.attention(tokens, position, reference, shapes)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            steps = [
                Step(self.attention.output_proj, residual="given", after=self.norm1),
                Step(self.linear1, activation="relu"),
                Step(self.linear2, residual=0, after=self.norm2),
            ]
            if _linear_chain.runs(attended, steps, residual=tokens):
                return _linear_chain.run(attended, steps, residual=tokens)
        return tokenwise(self, self._after_attention, tokens, attended, width=self.linear1.out_features)

    def _after_attention(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = self.norm1(project(self.attention.output_proj, attended, residual=tokens))
        hidden = project(self.linear1, tokens, activation="relu")
        return self.norm2(project(self.linear2, hidden, residual=tokens))


class PixelDecoder(nn.Module):
    """Stage features to one width, mixed across all levels.

    Args of forward: features, channels-last (B, Hᵢ, Wᵢ, Cᵢ), from stride 4 to stride 32.
    Returns (levels, mask_features): levels from stride 32 to 4, each (B, HₗWₗ, width) with its (Hₗ, Wₗ);
    mask_features (B, width, H/4, W/4), channels last in memory. In the flattened sequence, too, the coarsest level
    comes first.
    """

    def __init__(self, channels: tuple[int, ...], config: MaskDecoderConfig) -> None:
        super().__init__()
        coarse_first = tuple(reversed(channels))
        self.input_proj = nn.ModuleList(nn.Conv2d(c, config.width, 1) for c in coarse_first)
        groups = math.gcd(32, config.width)
        self.input_norm = nn.ModuleList(nn.GroupNorm(groups, config.width) for _ in coarse_first)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.level_embed = nn.Parameter(torch.randn(len(channels), config.width))
        self.layers = nn.ModuleList(DeformableLayer(config, len(channels)) for _ in range(config.pixel_layers))
        self.mask_features = nn.Conv2d(config.width, config.width, 1)

    def forward(self, features: list[Tensor]) -> tuple[list[tuple[Tensor, tuple[int, int]]], Tensor]:
        coarse_first = features[::-1]
        shapes = [(f.shape[1], f.shape[2]) for f in coarse_first]
        tokens, positions = [], []
        for level, feature in enumerate(coarse_first):
            # Channels stay last: norms and products then read the map as it lies.
            projected = pointwise(self.input_proj[level], feature)
            projected = self.input_norm[level](projected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            tokens.append(projected.flatten(1, 2))
            position = sine_position(*shapes[level], projected.shape[3], projected.device, projected.dtype)
            positions.append(position + self.level_embed[level])
        x, position = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        reference = _pixel_centres(shapes, x.device)
        for layer in self.layers:
            x = layer(x, position, reference, shapes)
        split = x.split([h * w for h, w in shapes], dim=1)
        finest = pointwise(self.mask_features, split[-1].unflatten(1, shapes[-1]))
        return list(zip(split, shapes, strict=True)), finest.permute(0, 3, 1, 2)


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of size 1 on a channels-last map: (B, H, W, C) → (B, H, W, C')."""
    return linear(x, convolution.weight.flatten(1), convolution.bias)


def _pixel_centres(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(ΣHₗWₗ, 2) pixel centres of all levels as (x, y) in [0, 1]."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        centres.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    return torch.cat(centres)
