"""Multi-head attention of tokens, as papers write it: four Linears around a softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import ops


class TokenAttention(nn.Module):
    """Queries (B, N, Q) read keys and values (B, M, K): (B, N, C), C channels in `heads` heads, scale (C / heads)^-½.

    Args:
        width: C, of the attention and of what comes out.
        heads: how many; they divide C.
        query_width, key_width: Q and K; C unless said.
    """

    def __init__(self, width: int, heads: int, *, query_width: int | None = None, key_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide the {width} channels")
        self.heads = heads
        self.query = nn.Linear(query_width or width, width)
        self.key = nn.Linear(key_width or width, width)
        self.value = nn.Linear(key_width or width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, read: Tensor, mask: Tensor | None = None, *, silenced: bool = False) -> Tensor:
        """x asks, `read` answers.

        Args:
            x: (B, N, Q).
            read: (B, M, K).
            mask: (B, M) bool, True for what may be read.
            silenced: what may not be read is a key and a value of zeros, and takes its part of the softmax.
        """
        key, value = self.key(read), self.value(read)
        if mask is not None and silenced:
            keep = mask[..., None]
            key, value, mask = torch.where(keep, key, 0), torch.where(keep, value, 0), None
        attended, _ = ops.cross_modal_attention(self.query(x), key, value, text_mask=mask, num_heads=self.heads)
        return self.output(attended)


class SentenceRead(nn.Module):
    """What a sentence finds in a map: v = sum_p softmax_p((W_q s) . (W_k x_p) / sqrt(d)) W_v x_p.

    forward(x (B, H, W, C), sentence (B, S)) returns (B, d).

    Args:
        channels: C. sentence_width: S. width: d.
    """

    def __init__(self, channels: int, sentence_width: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(sentence_width, width)
        self.key, self.value = nn.Linear(channels, width), nn.Linear(channels, width)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        pixels, query = x.flatten(1, 2), self.query(sentence)[:, None]
        _, found = ops.cross_modal_attention(
            None, None, None, text_query=query, image_key=self.key(pixels), image_value=self.value(pixels)
        )
        return found[:, 0]


class Attention(nn.Module):
    """Multi-head attention with dropout on its weights."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query (B, N, C); key, value (B, M, C); allowed, bool, to be broadcast to (B, heads, N, M)."""
        q, k, v = (
            linear(t).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear, t in ((self.query, query), (self.key, key), (self.value, value))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).flatten(2))
