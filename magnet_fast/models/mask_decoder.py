"""The mask decoder: one query that reads the pyramid inside its own previous mask (Cheng et al., Mask2Former)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MaskDecoderConfig
from .position import sine_position


class QueryAttention(nn.Module):
    """Multi-head attention of the query with its residual and LayerNorm, on PyTorch's own fused attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x, query (B, Q, C); key, value (B, P, C); allowed (B, 1, Q, P) bool → (B, Q, C)."""
        q, k, v = (
            projection(t).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection, t in ((self.query, query), (self.key, key), (self.value, value))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.norm(x + self.output(attended.transpose(1, 2).flatten(2)))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward, each post-norm."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        self.cross_attention = QueryAttention(config.width, config.num_heads)
        self.self_attention = QueryAttention(config.width, config.num_heads)
        self.linear1 = nn.Linear(config.width, config.mask_feedforward)
        self.linear2 = nn.Linear(config.mask_feedforward, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, embed: Tensor, memory: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        x = self.cross_attention(x, x + embed, memory + position, memory, allowed)
        x = self.self_attention(x, x + embed, x + embed, x)
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MaskDecoder(nn.Module):
    """Pyramid levels and mask features to predictions: one before the first layer and one after each.

    Returns a list of (mask_logits (B, 1, H/4, W/4), class_logits (B, 1, 2)); the last is the answer.
    """

    levels_read = 3  # strides 32, 16 and 8, in turn

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.query_feature = nn.Embedding(1, width)
        self.query_embed = nn.Embedding(1, width)
        self.level_embed = nn.Embedding(self.levels_read, width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.mask_layers))
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, 2)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(
        self, levels: list[tuple[Tensor, tuple[int, int]]], mask_features: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        batch = mask_features.shape[0]
        memories, positions, shapes = [], [], []
        for index, (tokens, shape) in enumerate(levels[: self.levels_read]):
            memories.append(tokens + self.level_embed.weight[index])
            positions.append(sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
            shapes.append(shape)
        x = self.query_feature.weight.expand(batch, -1, -1)
        embed = self.query_embed.weight.expand(batch, -1, -1)
        predictions = [self._predict(x, mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % self.levels_read
            allowed = _inside_previous_mask(predictions[-1][0], shapes[level])
            x = layer(x, embed, memories[level], positions[level], allowed)
            predictions.append(self._predict(x, mask_features))
        return predictions

    def _predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        mask_logits = torch.einsum("bqc,bchw->bqhw", self.mask_head(x), mask_features)
        return mask_logits, self.class_head(x)


def _inside_previous_mask(mask_logits: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, 1, 1, P) bool: pixels where the previous mask, resized, is at least one half; all where none is."""
    resized = F.interpolate(mask_logits.detach().float(), size=shape, mode="bilinear", align_corners=False)
    inside = resized.flatten(2)[:, None] >= 0
    return inside | ~inside.any(dim=-1, keepdim=True)
