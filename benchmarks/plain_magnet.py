"""MagNet as the released code computes it: none of the restructurings of `magnet_fast.models`, for ratios and tests.

Within `models_run_plainly()` the models of this package project every pixel to keys and values for the one query,
convolve channels-first maps, normalise keys and values over all pixels, compute the words' residual whatever the
gate, and encode positions at every call. Parameters and results are the same. Operators are not touched: force
`ops.backend("reference")`, and take `plain.models_use_plain_attention` for window attention, to have all of it plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import ops
from magnet_fast.models import alignment, mask_decoder, pixel_decoder, position, pwam, swin


@contextmanager
def models_run_plainly() -> Iterator[None]:
    """Every model computes as released while this lasts, also those that exist already."""
    with ExitStack() as stack:
        for owner, name, function in _REPLACEMENTS:
            stack.enter_context(patch.object(owner, name, function))
        yield


def first_stage(self: swin.SwinEncoder, image: Tensor) -> Tensor:
    return self.stages[0](self.patch_embed(image))


def swin_block(self: swin.SwinBlock, x: Tensor) -> Tensor:
    x = x + self.drop_path(self.attention(self.norm1(x)))
    return x + self.drop_path(self.mlp(self.norm2(x)))


def pixel_word_attention(self: pwam.PWAM, pixels: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    vision = self.dropout(F.gelu(self.vision(pixels)))
    query = self.query_norm(self.query(pixels))
    key, value = self.key(words), self.value(words)
    attended, _ = ops.cross_modal_attention(
        query, key, value, text_mask=word_mask, num_heads=self.num_heads, scale=self.scale
    )
    return self.dropout(F.gelu(self.mix(vision * self.output_norm(self.output(attended)))))


def gate_is_never_closed(self: pwam.Gate) -> bool:
    return False


def absorbing_never_pays(self: pwam.TextPWAM, pixels: Tensor) -> bool:
    return False


def upsample(level: Tensor, size: tuple[int, int]) -> Tensor:
    side = int(level.shape[1] ** 0.5)
    grid = level.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, size=tuple(size), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def mix(self: alignment.Mixer, levels: list[Tensor], full: Tensor, size: tuple[int, int]) -> Tensor:
    first, norm, last = self
    maps = [upsample(level, size) for level in levels]
    return F.gelu(last(norm(first(torch.cat([*maps, full.unflatten(1, size)], dim=-1)))))


def deformable_attention(
    self: pixel_decoder.DeformableAttention,
    tokens: Tensor,
    position: Tensor,
    reference: Tensor,
    shapes: list[tuple[int, int]],
) -> Tensor:
    batch, count, width = tokens.shape
    query = tokens + position
    grid = (batch, count, self.num_heads, self.levels, self.points)
    offsets = self.sampling_offsets(query).view(*grid, 2)
    weights = self.attention_weights(query).view(*grid[:3], -1).softmax(dim=-1).view(grid)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=wide, device=tokens.device)
    locations = reference.to(wide)[None, :, None, None, None] + offsets.to(wide) / sizes[:, None]
    value = self.value_proj(tokens).view(batch, count, self.num_heads, width // self.num_heads)
    return self.output_proj(ops.deformable_attention(value, shapes, locations, weights.to(value.dtype)))


def deformable_layer(
    self: pixel_decoder.DeformableLayer,
    tokens: Tensor,
    position: Tensor,
    reference: Tensor,
    shapes: list[tuple[int, int]],
) -> Tensor:
    tokens = self.norm1(tokens + self.attention(tokens, position, reference, shapes))
    return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


def pixel_decode(
    self: pixel_decoder.PixelDecoder, features: list[Tensor]
) -> tuple[list[tuple[Tensor, tuple[int, int]]], Tensor]:
    coarse_first = features[::-1]
    shapes = [(f.shape[1], f.shape[2]) for f in coarse_first]
    tokens, positions = [], []
    for level, feature in enumerate(coarse_first):
        projected = self.input_norm[level](self.input_proj[level](feature.permute(0, 3, 1, 2)))
        tokens.append(projected.flatten(2).transpose(1, 2))
        encoded = _sine_position(*shapes[level], projected.shape[1], projected.device, projected.dtype)
        positions.append(encoded + self.level_embed[level])
    x, encoded = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
    reference = _pixel_centres(shapes, x.device)
    for layer in self.layers:
        x = layer(x, encoded, reference, shapes)
    split = x.split([h * w for h, w in shapes], dim=1)
    finest = split[-1].transpose(1, 2).unflatten(2, shapes[-1])
    return list(zip(split, shapes, strict=True)), self.mask_features(finest)


def query_attention(
    self: mask_decoder.QueryAttention,
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    q, k, v = (
        projection(t).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        for projection, t in ((self.query, query), (self.key, key), (self.value, value))
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return self.norm(x + self.output(attended.transpose(1, 2).flatten(2)))


def mask_decode(
    self: mask_decoder.MaskDecoder, levels: list[tuple[Tensor, tuple[int, int]]], mask_features: Tensor
) -> list[tuple[Tensor, Tensor]]:
    batch = mask_features.shape[0]
    memories, positions, resized = [], [], []
    for index, (tokens, shape) in enumerate(levels[: self.levels_read]):
        memories.append(tokens + self.level_embed.weight[index])
        positions.append(_sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
        small = F.interpolate(mask_features.detach(), size=shape, mode="bilinear", align_corners=False)
        resized.append(small.flatten(2))
    x = self.query_feature.weight.expand(batch, -1, -1)
    embed = self.query_embed.weight.expand(batch, -1, -1)
    queries = [self.norm(x)]
    for index, layer in enumerate(self.layers):
        level = index % self.levels_read
        with torch.no_grad():
            inside = torch.bmm(self.mask_head(queries[-1]).to(resized[level].dtype), resized[level])[:, None] >= 0
            allowed = inside | ~inside.any(dim=-1, keepdim=True)
        keys = memories[level] + positions[level]
        x = query_attention(layer.cross_attention, x, x + embed, keys, memories[level], allowed)
        x = query_attention(layer.self_attention, x, x + embed, x + embed, x)
        x = layer.norm(x + layer.linear2(F.relu(layer.linear1(x))))
        queries.append(self.norm(x))
    stacked = torch.cat(queries, dim=1)
    masks = torch.einsum("bnc,bchw->bnhw", self.mask_head(stacked), mask_features)
    classes = self.class_head(stacked)
    return [(masks[:, i : i + 1], classes[:, i : i + 1]) for i in range(len(queries))]


def _sine_position(*arguments: Any) -> Tensor:
    return position._encode(*arguments)


def _pixel_centres(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(ΣHₗWₗ, 2) pixel centres of all levels as (x, y) in [0, 1]."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        centres.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    return torch.cat(centres)


_REPLACEMENTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (swin, "sine_position", _sine_position),
    (swin.SwinEncoder, "first_stage", first_stage),
    (swin.SwinBlock, "forward", swin_block),
    (pwam.PWAM, "forward", pixel_word_attention),
    (pwam.Gate, "closed", gate_is_never_closed),
    (pwam.TextPWAM, "_absorbing_pays", absorbing_never_pays),
    (alignment.Mixer, "forward", mix),
    (pixel_decoder.DeformableAttention, "forward", deformable_attention),
    (pixel_decoder.DeformableLayer, "forward", deformable_layer),
    (pixel_decoder.PixelDecoder, "forward", pixel_decode),
    (mask_decoder.MaskDecoder, "forward", mask_decode),
]
