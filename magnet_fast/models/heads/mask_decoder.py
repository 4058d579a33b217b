"""The mask decoder: one query that reads the pyramid inside its own previous mask (Cheng et al., Mask2Former)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.models.heads.pixel_decoder import Level
from magnet_fast.models.position import sine_position

_LEVELS_READ = 3  # at most; the coarsest ones (strides 32, 16 and 8), in turn


class MaskDecoder(nn.Module):
    """Pyramid levels and mask features to predictions: one before the first layer and one after each.

    Args:
        levels: of the pyramid.
        width: C of pyramid and mask features.
        num_heads: of every attention.
        layers: how many.
        feedforward: width inside a layer's feed-forward network.
    """

    def __init__(self, *, levels: int, width: int, num_heads: int, layers: int, feedforward: int) -> None:
        super().__init__()
        self.levels_read = min(_LEVELS_READ, levels)
        self.query_feature = nn.Parameter(torch.randn(1, width))
        self.query_embed = nn.Parameter(torch.randn(1, width))
        self.level_embed = nn.Parameter(torch.randn(self.levels_read, width))
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, feedforward) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, 2)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, levels: list[Level], mask_features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Levels, the coarsest first, and mask features (B, C, h, w) to a list of (mask logits (B, h, w), presence
        logits (B,)); the last is the answer."""
        batch = mask_features.shape[0]
        memories, keys, resized = [], [], []
        for index, (tokens, shape) in enumerate(levels[: self.levels_read]):
            memories.append(tokens + self.level_embed[index])
            keys.append(memories[-1] + sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
            # Resizing is linear, so it may come before the product with the query.
            small = F.interpolate(mask_features.detach(), size=shape, mode="bilinear", align_corners=False)
            resized.append(small.flatten(2))
        x = self.query_feature.expand(batch, -1, -1)
        embed = self.query_embed.expand(batch, -1, -1)
        predictions = [self.predict(x, mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % self.levels_read
            allowed = inside_mask(self.mask_head(self.norm(x)).detach(), resized[level])
            x = layer(x, embed, keys[level], memories[level], allowed)
            predictions.append(self.predict(x, mask_features))
        return predictions

    def predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """The query (B, 1, C) to mask logits (B, h, w) and presence logits (B,)."""
        query = self.norm(x)
        mask = torch.einsum("bqc,bchw->bqhw", self.mask_head(query), mask_features)[:, 0]
        return mask, presence_of(self.class_head(query)[:, 0])


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward, each post-norm."""

    is_repeated_layer = True

    def __init__(self, width: int, num_heads: int, feedforward: int) -> None:
        super().__init__()
        self.cross_attention = QueryAttention(width, num_heads)
        self.self_attention = QueryAttention(width, num_heads)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, embed: Tensor, keys: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """x, embed (B, 1, C); keys, the memory with its position added, and memory (B, P, C); allowed as in
        `QueryAttention`."""
        x = self.cross_attention(x, x + embed, keys, memory, allowed)
        x = self.self_attention(x, x + embed, x + embed, x)
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class QueryAttention(nn.Module):
    """Multi-head attention with its residual and LayerNorm."""

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
        """x, query (B, Q, C); key, value (B, P, C); allowed (B, 1, Q, P) bool, all where None → (B, Q, C)."""
        q, k, v = (
            projection(t).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection, t in ((self.query, query), (self.key, key), (self.value, value))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.norm(x + self.output(attended.transpose(1, 2).flatten(2)))


def inside_mask(embedding: Tensor, resized: Tensor) -> Tensor:
    """(B, 1, 1, P) bool: pixels where the query's present mask is at least one half; all pixels where none is.

    Args:
        embedding: (B, 1, C) of the query. resized: (B, C, P) mask features at the level's size.
    """
    with torch.no_grad():
        inside = torch.bmm(embedding.to(resized.dtype), resized)[:, None] >= 0
        return inside | ~inside.any(dim=-1, keepdim=True)


def presence_of(pair: Tensor) -> Tensor:
    """(..., 2) logits of nothing and of something to the logit of their softmax, in float32."""
    nothing, something = pair.float().unbind(dim=-1) if pair.dtype != torch.float64 else pair.unbind(dim=-1)
    return something - nothing
