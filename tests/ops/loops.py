"""The operators once more, as slow loops over tokens that read like the formulas. They share no code with the package.

Every function computes in the dtype of its inputs: float64 gives the truth, bfloat16 the error of the same maths in
low precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def window_attention(qkv, bias_table, *, num_heads, window, shift, pad_qkv=None, scale=None, pad_first=True) -> Tensor:
    batch, height, width, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    d = channels // num_heads
    scale = d**-0.5 if scale is None else scale
    window_h, window_w = window
    padded_h, padded_w = math.ceil(height / window_h) * window_h, math.ceil(width / window_w) * window_w
    padding = qkv.new_zeros(3 * channels) if pad_qkv is None else pad_qkv

    def source(shifted: int, length: int, padded: int, offset: int) -> int | None:
        """Where in the map a place of the shifted map comes from; None for padding."""
        if pad_first:
            place = (shifted + offset) % padded
            return place if place < length else None
        return (shifted + offset) % length if shifted < length else None

    def region(shifted: int, padded: int, side: int, offset: int) -> int:
        return 0 if not offset else (shifted >= padded - side) + (shifted >= padded - offset)

    def token(image: int, y: int, x: int) -> Tensor:
        row, column = source(y, height, padded_h, shift[0]), source(x, width, padded_w, shift[1])
        return padding if row is None or column is None else qkv[image, row, column]

    out = torch.zeros_like(qkv[..., :channels])
    for image in range(batch):
        for y in range(padded_h):
            for x in range(padded_w):
                row, column = source(y, height, padded_h, shift[0]), source(x, width, padded_w, shift[1])
                if row is None or column is None:
                    continue
                top, left = y - y % window_h, x - x % window_w
                keys = [
                    (ky, kx)
                    for ky in range(top, top + window_h)
                    for kx in range(left, left + window_w)
                    if region(ky, padded_h, window_h, shift[0]) == region(y, padded_h, window_h, shift[0])
                    and region(kx, padded_w, window_w, shift[1]) == region(x, padded_w, window_w, shift[1])
                ]
                tokens = torch.stack([token(image, *key) for key in keys])
                entries = [(y - ky + window_h - 1) * (2 * window_w - 1) + x - kx + window_w - 1 for ky, kx in keys]
                for head in range(num_heads):
                    q, k, v = (slice(i * channels + head * d, i * channels + (head + 1) * d) for i in range(3))
                    logits = scale * (tokens[:, k] @ token(image, y, x)[q]) + bias_table[entries, head].to(qkv.dtype)
                    out[image, row, column, head * d : (head + 1) * d] = logits.softmax(0) @ tokens[:, v]
    return out


def relative_attention(qkv, rel_height, rel_width, *, num_heads, window=None, pad_qkv=None, scale=None) -> Tensor:
    batch, height, width, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    d = channels // num_heads
    scale = d**-0.5 if scale is None else scale
    window_h, window_w = window or (height, width)
    padding = qkv.new_zeros(3 * channels) if pad_qkv is None else pad_qkv
    out = torch.zeros_like(qkv[..., :channels])
    for image in range(batch):
        for y in range(height):
            for x in range(width):
                top, left = y - y % window_h, x - x % window_w
                keys = [(ky, kx) for ky in range(top, top + window_h) for kx in range(left, left + window_w)]
                tokens = torch.stack([qkv[image, ky, kx] if ky < height and kx < width else padding for ky, kx in keys])
                rows = torch.stack([rel_height[y - ky + window_h - 1] for ky, _ in keys])
                columns = torch.stack([rel_width[x - kx + window_w - 1] for _, kx in keys])
                for head in range(num_heads):
                    q, k, v = (slice(i * channels + head * d, i * channels + (head + 1) * d) for i in range(3))
                    query = qkv[image, y, x, q]
                    logits = scale * (tokens[:, k] @ query) + rows @ query + columns @ query
                    out[image, y, x, head * d : (head + 1) * d] = logits.softmax(0) @ tokens[:, v]
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float, keep: Tensor | None) -> Tensor:
    """(B, M, C), (B, N, C), (B, N, Cv) -> (B, M, Cv); ``keep`` (B, N) says which keys count."""
    rows = []
    for image in range(query.shape[0]):
        for m in range(query.shape[1]):
            heads = []
            for head in range(num_heads):
                q, k, v = (part.chunk(num_heads, -1)[head][image] for part in (query, key, value))
                chosen = range(len(k)) if keep is None else [n for n in range(len(k)) if keep[image, n]]
                if not len(chosen):
                    heads.append(v[0] * 0)
                    continue
                logits = torch.stack([scale * (q[m] * k[n]).sum() for n in chosen])
                weights = (logits - logits.max()).exp()
                weights = weights / weights.sum()
                heads.append(sum(weight * v[n] for weight, n in zip(weights, chosen, strict=True)))
            rows.append(torch.cat(heads))
    return torch.stack(rows).view(query.shape[0], query.shape[1], -1)


def cross_modal_attention(
    image_query, text_key, text_value, text_query, image_key, image_value, *, text_mask, num_heads, scale
) -> tuple[Tensor, Tensor]:
    """Both directions; the shared form is ``text_query = text_key`` and ``image_key = image_query``."""
    image_out = attention(image_query, text_key, text_value, num_heads, scale, text_mask)
    text_out = attention(text_query, image_key, image_value, num_heads, scale, None)
    if text_mask is not None:
        text_out = torch.stack(
            [
                torch.stack([row if word else row * 0 for row, word in zip(rows, words, strict=True)])
                for rows, words in zip(text_out, text_mask, strict=True)
            ]
        )
    return image_out, text_out


def deformable_attention(value, spatial_shapes, sampling_locations, attention_weights) -> Tensor:
    batch, _, heads, d = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    rows = []
    for image in range(batch):
        for query in range(queries):
            for head in range(heads):
                total, start = value.new_zeros(d), 0
                for level, (height, width) in enumerate(spatial_shapes):
                    for point in range(points):
                        location = sampling_locations[image, query, head, level, point]
                        x, y = location[0] * width - 0.5, location[1] * height - 0.5
                        left, top = math.floor(x.item()), math.floor(y.item())
                        for row, wy in ((top, top + 1 - y), (top + 1, y - top)):
                            for column, wx in ((left, left + 1 - x), (left + 1, x - left)):
                                if 0 <= row < height and 0 <= column < width:
                                    pixel = value[image, start + row * width + column, head]
                                    weight = attention_weights[image, query, head, level, point]
                                    total = total + weight * wy * wx * pixel
                    start += height * width
                rows.append(total)
    return torch.stack(rows).view(batch, queries, heads * d)


def pixel_contrastive_loss(features, mask, temperature: float) -> Tensor:
    """features (B, P, C), mask (B, P) bool"""
    losses = []
    for z, inside in zip(features, mask, strict=True):
        z = [row / row.square().sum().sqrt() for row in z]
        total = features.new_zeros(())
        for side in (True, False):
            own = [i for i in range(len(z)) if bool(inside[i]) == side]
            terms = []
            for i in own:
                similar = [((z[i] * row).sum() / temperature).exp() for row in z]
                terms.append(-(sum(similar[j] for j in own) / sum(similar)).log())
            if terms:
                total = total + sum(terms) / len(terms)
        losses.append(total)
    return torch.stack(losses)
