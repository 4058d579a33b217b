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
        memories, positions, resized = [], [], []
        for index, (tokens, shape) in enumerate(levels[: self.levels_read]):
            memories.append(tokens + self.level_embed.weight[index])
            positions.append(sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
            resized.append(_resize(mask_features.detach(), shape))
        x = self.query_feature.weight.expand(batch, -1, -1)
        embed = self.query_embed.weight.expand(batch, -1, -1)
        queries = [self.norm(x)]
        for index, layer in enumerate(self.layers):
            level = index % self.levels_read
            allowed = _inside_mask(self.mask_head(queries[-1].detach()), resized[level])
            x = layer(x, embed, memories[level], positions[level], allowed)
            queries.append(self.norm(x))
        # All predictions in one product: its backward pass goes over the large mask features once, not ten times.
        stacked = torch.cat(queries, dim=1)  # (B, 1 + layers, C)
        masks = torch.einsum("bnc,bchw->bnhw", self.mask_head(stacked), mask_features)
        classes = self.class_head(stacked)
        return [(masks[:, i : i + 1], classes[:, i : i + 1]) for i in range(len(queries))]


def _resize(mask_features: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, C, H/4, W/4) to (B, C, P): resizing is linear, so it may come before the product with the query."""
    return F.interpolate(mask_features, size=shape, mode="bilinear", align_corners=False).flatten(2)


def _inside_mask(embedding: Tensor, resized_features: Tensor) -> Tensor:
    """(B, 1, 1, P) bool: pixels where the query's present mask is at least one half; all pixels where none is."""
    with torch.no_grad():
        inside = torch.bmm(embedding.to(resized_features.dtype), resized_features)[:, None] >= 0
        return inside | ~inside.any(dim=-1, keepdim=True)
