"""Layers in float64, written out: what tests of heads compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """A Linear, or a 1x1 convolution as one, over the last axis."""
    weight = module.weight.flatten(1)
    found = torch.einsum("...c,dc->...d", x, weight)
    return found if module.bias is None else found + module.bias


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def attention(module: nn.Module, heads: int, x: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
    """x (N, C) reads (M, C), of which those count that mask (M,) says: head by head and query by query."""
    query, key, value = linear(module.query, x), linear(module.key, read), linear(module.value, read)
    width = query.shape[1] // heads
    rows = []
    for n in range(len(x)):
        parts = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            chosen = [m for m in range(len(read)) if mask is None or mask[m]]
            scores = torch.stack([query[n, part] @ key[m, part] / math.sqrt(width) for m in chosen])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(w * value[m, part] for w, m in zip(weights, chosen, strict=True)))
        rows.append(torch.cat(parts))
    return linear(module.output, torch.stack(rows))


def pre_norm_layer(
    module: nn.Module, heads: int, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """x + attention(norm(x)), then x + FFN(norm(x)), of one item."""
    y = layer_norm(module.norm1, x)
    x = x + attention(module.attention, heads, y, y if read is None else read, mask)
    first, _, last = module.feedforward
    hidden = linear(first, layer_norm(module.norm2, x))
    return x + linear(last, 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
