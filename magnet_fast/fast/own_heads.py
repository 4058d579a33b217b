"""Mask2Former's head with one query, faster: channels stay last, no pixel is projected, all predictions at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.fast._replacement import must_run_original, upstream_class
from magnet_fast.fast.own_parts import (
    kept_sine_position,
    plain_pointwise,
    pointwise,
    project,
    tokenwise,
    with_zero_gradients,
)
from magnet_fast.models.heads import pixel_decoder
from magnet_fast.models.heads.mask_decoder import inside_mask, presence_of
from magnet_fast.models.heads.pixel_decoder import Level, pixel_centres
from magnet_fast.ops import _linear_chain
from magnet_fast.ops._linear import plain_linear
from magnet_fast.ops._linear_chain import Step


class _LevelMixer:
    """Channels stay last: norms and products read the maps as they lie. The encoding of places is kept."""

    def mix(self, maps: list[Tensor]) -> list[Level]:
        if must_run_original(self, *self.input_proj) or not all(map(plain_pointwise, self.input_proj)):
            return super().mix(maps)
        coarse_first = maps[::-1]
        shapes = [(feature.shape[1], feature.shape[2]) for feature in coarse_first]
        tokens, positions = [], []
        for level, feature in enumerate(coarse_first):
            projected = pointwise(self.input_proj[level], feature)
            projected = self.input_norm[level](projected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            tokens.append(projected.flatten(1, 2))
            position = kept_sine_position(*shapes[level], projected.shape[3], projected.device, projected.dtype)
            positions.append(position + self.level_embed[level])
        x, position = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        reference = pixel_centres(shapes, x.device)
        for layer in self.layers:
            x = layer(x, position, reference, shapes)
        return list(zip(x.split([height * width for height, width in shapes], dim=1), shapes, strict=True))


class PixelDecoder(_LevelMixer):
    __doc__ = _LevelMixer.__doc__

    def forward(self, maps: list[Tensor]) -> tuple[list[Level], Tensor]:
        if must_run_original(self, self.mask_features) or not plain_pointwise(self.mask_features):
            return super().forward(maps)
        levels = self.mix(maps)
        return levels, pointwise(self.mask_features, channels_last(levels[-1])).permute(0, 3, 1, 2)


class PyramidPixelDecoder(_LevelMixer):
    __doc__ = _LevelMixer.__doc__

    def forward(self, maps: list[Tensor]) -> tuple[list[Level], Tensor]:
        convolutions = (self.lateral, self.mask_features)
        if must_run_original(self, *convolutions) or not all(map(plain_pointwise, convolutions)):
            return super().forward(maps)
        finest, *mixed = maps
        levels = self.mix(mixed)
        y = self.lateral_norm(pointwise(self.lateral, finest).permute(0, 3, 1, 2))
        coarse = channels_last(levels[-1]).permute(0, 3, 1, 2)
        y = y + F.interpolate(coarse, size=y.shape[2:], mode="bilinear", align_corners=False)
        y = F.relu(self.smooth_norm(self.smooth(y))).permute(0, 2, 3, 1)
        return levels, pointwise(self.mask_features, y).permute(0, 3, 1, 2)


class DeformableLayer:
    """In inference: what follows the attention as a chain of packed weights, or a few tokens at a time."""

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._whole():
            return super().forward(tokens, position, reference, shapes)
        attended = self.attention.attend(tokens, position, reference, shapes)
        steps = [
            Step(self.attention.output_proj, residual="given", after=self.norm1),
            Step(self.linear1, activation="relu"),
            Step(self.linear2, residual=0, after=self.norm2),
        ]
        if _linear_chain.runs(attended, steps, residual=tokens):
            return _linear_chain.run(attended, steps, residual=tokens)
        return tokenwise(self, self._after_attention, tokens, attended, width=self.linear1.out_features)

    def _whole(self) -> bool:
        """Whether nobody watches a part or put another module in its place."""
        attention = self.attention
        return (
            upstream_class(attention) is pixel_decoder.DeformableAttention
            and plain_linear(attention.output_proj, self.linear1, self.linear2)
            and type(self.norm1) is type(self.norm2) is nn.LayerNorm
            and not must_run_original(
                self, attention, attention.output_proj, self.norm1, self.linear1, self.linear2, self.norm2
            )
        )

    def _after_attention(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = self.norm1(project(self.attention.output_proj, attended, residual=tokens))
        hidden = project(self.linear1, tokens, activation="relu")
        return self.norm2(project(self.linear2, hidden, residual=tokens))


class DeformableAttention:
    """Its projections are products; what lies before the last one is a method, for the layer."""

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        if must_run_original(self):
            return super().forward(tokens, position, reference, shapes)
        return project(self.output_proj, self.attend(tokens, position, reference, shapes))

    def attend(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
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


class MaskDecoder:
    """All predictions in one product: its backward pass goes over the large mask features once, not ten times. Features
    are resized once a level, and the encoding of places is kept."""

    def forward(self, levels: list[Level], mask_features: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not self._plain_parts() or must_run_original(
            self, self.norm, self.class_head, self.mask_head, *self.mask_head
        ):
            return super().forward(levels, mask_features)
        batch = mask_features.shape[0]
        memories, keys, resized = [], [], []
        for index, (tokens, shape) in enumerate(levels[: self.levels_read]):
            memories.append(tokens + self.level_embed[index])
            keys.append(memories[-1] + kept_sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
            small = F.interpolate(mask_features.detach(), size=shape, mode="bilinear", align_corners=False)
            resized.append(pixels_last(small))
        x = self.query_feature.expand(batch, -1, -1)
        embed = self.query_embed.expand(batch, -1, -1)
        queries = [self.norm(x)]
        for index, layer in enumerate(self.layers):
            level = index % self.levels_read
            allowed = inside_mask(self.mask_head(queries[-1].detach()), resized[level])
            x = layer(x, embed, keys[level], memories[level], allowed)
            queries.append(self.norm(x))
        stacked = torch.cat(queries, dim=1)  # (B, 1 + layers, C)
        # bmm, not @: that copies bfloat16 features so that channels come first.
        masks = torch.bmm(self.mask_head(stacked), pixels_last(mask_features)).unflatten(2, mask_features.shape[2:])
        presences = presence_of(self.class_head(stacked))
        return list(zip(masks.unbind(dim=1), presences.unbind(dim=1), strict=True))

    def _plain_parts(self) -> bool:
        """Whether what is called once for all predictions treats every query alone, and is called for nothing else."""
        return (
            type(self.norm) is nn.LayerNorm
            and type(self.mask_head) is nn.Sequential
            and all(type(layer) is nn.ReLU or plain_linear(layer) for layer in (self.class_head, *self.mask_head))
        )


class QueryAttention:
    """One query and many pixels: no pixel is projected.

    A score q·(W_k x + b_k) is (W_kᵀ q)·x plus a constant that softmax drops, and Σ p (W_v x + b_v) is W_v Σ p x + b_v
    because Σ p = 1: each head's query becomes a query of full width, and one attention with the raw pixels as keys and
    values serves all heads. One key alone has all the attention, whatever query and key are.
    """

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        projections = (self.query, self.key, self.value)
        if query.shape[1] != 1 or not self._absorbable() or must_run_original(self, *projections):
            return super().forward(x, query, key, value, allowed)
        if key.shape[1] == 1 and allowed is None:
            unread = (parameter for layer in (self.query, self.key) for parameter in layer.parameters())
            return self.norm(x + self.output(with_zero_gradients(self.value(value), query, key, *unread)))
        heads = (self.num_heads, -1)
        q = self.query(query).squeeze(1).unflatten(1, heads)  # (B, h, d)
        q = (q * q.shape[2] ** -0.5).transpose(0, 1)
        absorbed = (q @ self.key.weight.unflatten(0, heads)).transpose(0, 1)  # (B, h, C)
        mask = None if allowed is None else allowed.expand(-1, 1, 1, -1)
        read = F.scaled_dot_product_attention(
            absorbed[:, None], key[:, None], value[:, None], attn_mask=mask, scale=1.0
        ).squeeze(1)  # (B, h, C)
        values = read.transpose(0, 1) @ self.value.weight.unflatten(0, heads).transpose(1, 2)
        attended = with_zero_gradients(values.transpose(0, 1).flatten(1) + self.value.bias, self.key.bias)
        return self.norm(x + self.output(attended)[:, None])

    def _absorbable(self) -> bool:
        projections = (self.query, self.key, self.value)
        return plain_linear(*projections) and all(layer.bias is not None for layer in projections)


def pixels_last(features: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, H·W), a view where channels lie last.

    A batch of one keeps the stride of a batch: what `flatten(2)` makes of it, oneDNN copies before it multiplies.
    """
    return features.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)


def channels_last(level: Level) -> Tensor:
    """(B, H, W, C) of a level's tokens."""
    tokens, shape = level
    return tokens.unflatten(1, shape)
