"""The mask decoder: one query that reads the pyramid inside its own previous mask (Cheng et al., Mask2Former)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MaskDecoderConfig
from .position import sine_position


class QueryAttention(nn.Module):
    """Multi-head attention of the one query to the pixels, with its residual and LayerNorm, projections absorbed.

    There is one query and there are many pixels, so no pixel is projected. A score q·(W_k x + b_k) is (W_kᵀ q)·x plus
    a constant that softmax drops, and Σ p (W_v x + b_v) is W_v Σ p x + b_v because Σ p = 1: each head's query becomes
    a query of full width, and one attention with the raw pixels as keys and values serves all heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """x, query (B, 1, C); key, value (B, P, C); allowed (B, 1, 1, P) bool → (B, 1, C)."""
        heads = (self.num_heads, -1)
        q = self.query(query).squeeze(1).unflatten(1, heads)  # (B, h, d)
        absorbed = torch.einsum("bhd,hdc->bhc", q * q.shape[2] ** -0.5, self.key.weight.unflatten(0, heads))
        read = F.scaled_dot_product_attention(
            absorbed[:, None], key[:, None], value[:, None], attn_mask=allowed, scale=1.0
        ).squeeze(1)  # (B, h, C)
        values = torch.einsum("bhc,hdc->bhd", read, self.value.weight.unflatten(0, heads))
        return self.norm(x + self.output(values.flatten(1) + self.value.bias)[:, None])


class LoneQueryAttention(QueryAttention):
    """Self-attention of one query: softmax over a single key is 1, whatever query and key are.

    Their projections stay in the module because released checkpoints hold them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, C) → (B, 1, C)."""
        return self.norm(x + self.output(self.value(x)))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward, each post-norm."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        self.cross_attention = QueryAttention(config.width, config.num_heads)
        self.self_attention = LoneQueryAttention(config.width, config.num_heads)
        self.linear1 = nn.Linear(config.width, config.mask_feedforward)
        self.linear2 = nn.Linear(config.mask_feedforward, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, embed: Tensor, keys: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """keys is the memory with its position added; both (B, P, C)."""
        x = self.cross_attention(x, x + embed, keys, memory, allowed)
        x = self.self_attention(x)
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
        memories, keys, resized = [], [], []
        for index, (tokens, shape) in enumerate(levels[: self.levels_read]):
            memories.append(tokens + self.level_embed.weight[index])
            keys.append(memories[-1] + sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
            resized.append(_resize(mask_features.detach(), shape))
        x = self.query_feature.weight.expand(batch, -1, -1)
        embed = self.query_embed.weight.expand(batch, -1, -1)
        queries = [self.norm(x)]
        for index, layer in enumerate(self.layers):
            level = index % self.levels_read
            allowed = _inside_mask(self.mask_head(queries[-1].detach()), resized[level])
            x = layer(x, embed, keys[level], memories[level], allowed)
            queries.append(self.norm(x))
        # All predictions in one product: its backward pass goes over the large mask features once, not ten times.
        stacked = torch.cat(queries, dim=1)  # (B, 1 + layers, C)
        # bmm, not @: that copies bfloat16 features so that channels come first.
        masks = torch.bmm(self.mask_head(stacked), _pixels_last(mask_features)).unflatten(2, mask_features.shape[2:])
        classes = self.class_head(stacked)
        return [(masks[:, i : i + 1], classes[:, i : i + 1]) for i in range(len(queries))]


def _resize(mask_features: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, C, H/4, W/4) to (B, C, P): resizing is linear, so it may come before the product with the query."""
    return _pixels_last(F.interpolate(mask_features, size=shape, mode="bilinear", align_corners=False))


def _pixels_last(features: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, H·W), a view where channels lie last.

    A batch of one keeps the stride of a batch: what `flatten(2)` makes of it, oneDNN copies before it multiplies.
    """
    return features.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)


def _inside_mask(embedding: Tensor, resized_features: Tensor) -> Tensor:
    """(B, 1, 1, P) bool: pixels where the query's present mask is at least one half; all pixels where none is."""
    with torch.no_grad():
        inside = torch.bmm(embedding.to(resized_features.dtype), resized_features)[:, None] >= 0
        return inside | ~inside.any(dim=-1, keepdim=True)
