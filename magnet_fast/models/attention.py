"""Multi-head attention of tokens, as papers write it: four Linears around a softmax."""

from __future__ import annotations

import torch
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
