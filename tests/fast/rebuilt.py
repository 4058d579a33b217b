"""Classes that research repositories share, rebuilt small from what is published of them: same interface, same sums.

Their text is read and changed by test_copies.py; so nothing here may depend on the file it stands in.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class MLPBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = nn.GELU()

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


def resized(table, side):
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.t()[None], size=2 * side - 1, mode="linear")[0].t()
    places = torch.arange(side)
    return table[places[:, None] - places + side - 1]


def with_positions(logits, query, tables, size):
    """Adds what a query has in common with the distance to a key, by rows and by columns."""
    height, width = size
    query = query.unflatten(1, size)
    rows = torch.einsum("nhwc,hkc->nhwk", query, resized(tables[0], height))
    columns = torch.einsum("nhwc,wkc->nhwk", query, resized(tables[1], width))
    return (logits.view(-1, height, width, height, width) + rows[..., None] + columns[:, :, :, None]).view_as(logits)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, side: int, use_rel_pos: bool = True) -> None:
        super().__init__()
        self.num_heads, self.scale, self.use_rel_pos = heads, (width // heads) ** -0.5, use_rel_pos
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.randn(2 * side - 1, width // heads))
            self.rel_pos_w = nn.Parameter(torch.randn(2 * side - 1, width // heads))

    def forward(self, x):
        batch, height, width, _ = x.shape
        parts = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.flatten(1, 2).unbind(0)
        logits = (query * self.scale) @ key.transpose(1, 2)
        if self.use_rel_pos:
            logits = with_positions(logits, query, (self.rel_pos_h, self.rel_pos_w), (height, width))
        read = logits.softmax(-1) @ value
        return self.proj(read.view(batch, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4).flatten(3))


def cut(x, side):
    """(B, H, W, C) to (B * rows * columns, side, side, C), zeros below and right of the map."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return x.reshape(-1, side, side, channels)


def joined(windows, side, batch, size):
    rows, columns = (math.ceil(length / side) for length in size)
    x = windows.view(batch, rows, columns, side, side, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]]


class Block(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, side: int = 4, window: int = 4) -> None:
        super().__init__()
        self.window_size = window
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, window or side), MLPBlock(width, 2 * width)

    def forward(self, x):
        kept = x
        x = self.norm1(x)
        if self.window_size > 0:
            x = joined(self.attn(cut(x, self.window_size)), self.window_size, len(x), x.shape[1:3])
        else:
            x = self.attn(x)
        x = kept + x
        return x + self.mlp(self.norm2(x))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, width),
            nn.Dropout(0),
        )

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.scale = heads, (window, window), (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + window - 1
        self.register_buffer("relative_position_index", apart[0] * (2 * window - 1) + apart[1])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(dropout), nn.Dropout(0.0), nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        windows, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (query * self.scale) @ key.transpose(-2, -1)
        logits = logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            logits = logits + mask.repeat(windows // len(mask), 1, 1)[:, None]
        weights = self.attn_drop(self.softmax(logits))
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).reshape(windows, tokens, width)))


def mask_of_shift(size, window, shift):
    """(windows, N, N), -100 between tokens that were not neighbours before the shift."""
    labels = torch.zeros(1, *(math.ceil(length / window) * window for length in size), 1)
    for row in (slice(-window), slice(-window, -shift), slice(-shift, None)):
        for column in (slice(-window), slice(-window, -shift), slice(-shift, None)):
            labels[:, row, column] = labels.max() + 1
    labels = cut(labels, window).flatten(1)
    return torch.where(labels[:, :, None] == labels[:, None], 0.0, -100.0)


def fill(block, window, shift, width=16, heads=2, dropout=0.0) -> None:
    block.window_size, block.shift_size = window, shift
    block.norm1, block.norm2, block.drop_path = nn.LayerNorm(width), nn.LayerNorm(width), nn.Identity()
    block.attn, block.mlp = WindowAttention(width, heads, window, dropout), Mlp(width, 2 * width)


def attended(block, x, size, mask):
    x = F.pad(x, (0, 0, 0, -size[1] % block.window_size, 0, -size[0] % block.window_size))
    padded = x.shape[1:3]
    if block.shift_size > 0:
        x = torch.roll(x, (-block.shift_size, -block.shift_size), (1, 2))
    batch = len(x)
    windows = block.attn(cut(x, block.window_size).flatten(1, 2), mask=mask if block.shift_size > 0 else None)
    x = joined(windows, block.window_size, batch, padded)
    if block.shift_size > 0:
        x = torch.roll(x, (block.shift_size, block.shift_size), (1, 2))
    return x[:, : size[0], : size[1]]


class SwinTransformerBlock(nn.Module):
    """Of a backbone: the stage around it tells the map's size and makes the mask."""

    def __init__(self, window: int = 4, shift: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        fill(self, window, shift, dropout=dropout)
        self.H = self.W = None

    def forward(self, x, mask_matrix):
        size = (self.H, self.W)
        kept = x
        x = attended(self, self.norm1(x).unflatten(1, size), size, mask_matrix)
        x = kept + self.drop_path(x.flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FixedSwinBlock(nn.Module):
    """For classification: the map's size and the mask are made with the block."""

    def __init__(self, size: tuple[int, int] = (8, 12), window: int = 4, shift: int = 2) -> None:
        super().__init__()
        fill(self, window, shift)
        self.input_resolution = size
        self.register_buffer("attn_mask", mask_of_shift(size, window, shift) if shift else None)

    def forward(self, x):
        kept = x
        x = attended(self, self.norm1(x).unflatten(1, self.input_resolution), self.input_resolution, self.attn_mask)
        x = kept + self.drop_path(x.flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SizedSwinBlock(nn.Module):
    """For restoration: whole windows of any number; the mask is made anew for another map."""

    def __init__(self, size: tuple[int, int] = (8, 8), window: int = 4, shift: int = 2) -> None:
        super().__init__()
        fill(self, window, shift)
        self.input_resolution = size
        self.register_buffer("attn_mask", mask_of_shift(size, window, shift) if shift else None)

    def forward(self, x, x_size):
        mask = self.attn_mask
        if self.input_resolution != x_size:
            mask = mask_of_shift(x_size, self.window_size, self.shift_size).to(x)
        kept = x
        x = attended(self, self.norm1(x).unflatten(1, x_size), x_size, mask)
        x = kept + self.drop_path(x.flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ShiftWindowMSA(nn.Module):
    """The attention of such a block with the windows in it; it makes its mask in every call."""

    def __init__(self, window: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.drop = window, shift, nn.Identity()
        self.w_msa = WindowAttention(16, 2, window)

    def forward(self, query, hw_shape):
        size, shift = tuple(hw_shape), self.shift_size
        x = query.unflatten(1, size)
        x = F.pad(x, (0, 0, 0, -size[1] % self.window_size, 0, -size[0] % self.window_size))
        padded, mask = x.shape[1:3], None
        if shift > 0:
            x = torch.roll(x, (-shift, -shift), (1, 2))
            mask = mask_of_shift(padded, self.window_size, shift).to(x)
        x = joined(self.w_msa(cut(x, self.window_size).flatten(1, 2), mask=mask), self.window_size, len(x), padded)
        if shift > 0:
            x = torch.roll(x, (shift, shift), (1, 2))
        return self.drop(x[:, : size[0], : size[1]].flatten(1, 2))


def sampled(value, shapes, places, weights):
    """(B, S, h, d) read at (B, Q, h, L, K, 2) with (B, Q, h, L, K), bilinearly, zeros outside."""
    batch, queries, heads = places.shape[:3]
    out = 0
    for level, part in enumerate(value.split([int(height * width) for height, width in shapes], 1)):
        feature_map = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, tuple(shapes[level].tolist()))
        grid = 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        read = F.grid_sample(feature_map, grid, align_corners=False)
        out = out + (read * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return out.view(batch, -1, queries).transpose(1, 2)


def places_of(points, offsets, shapes, samples):
    points = points[:, :, None, :, None]
    if points.shape[-1] == 2:
        return points + offsets / shapes.flip(1)[:, None]
    return points[..., :2] + offsets / samples * points[..., 2:] / 2


class MSDeformAttn(nn.Module):
    def __init__(self, d_model: int = 16, n_levels: int = 2, n_heads: int = 2, n_points: int = 3) -> None:
        super().__init__()
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * n_heads * n_levels * n_points)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj, self.output_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
    ):
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).unflatten(2, (self.n_heads, self.n_levels, self.n_points, 2))
        weights = self.attention_weights(query).unflatten(2, (self.n_heads, -1)).softmax(-1)
        places = places_of(reference_points, offsets, input_spatial_shapes, self.n_points)
        weights = weights.unflatten(3, (self.n_levels, self.n_points))
        return self.output_proj(sampled(value.unflatten(2, (self.n_heads, -1)), input_spatial_shapes, places, weights))


class MultiScaleDeformableAttention(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.num_levels, self.num_heads, self.num_points = 16, 2, 2, 3
        self.batch_first = batch_first
        self.sampling_offsets, self.attention_weights = nn.Linear(16, 24), nn.Linear(16, 12)
        self.value_proj, self.output_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(
        self,
        query,
        key=None,
        value=None,
        query_pos=None,
        key_padding_mask=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        **kwargs,
    ):
        if value is None:
            value = query
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).unflatten(2, (self.num_heads, self.num_levels, self.num_points, 2))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1)
        places = places_of(reference_points, offsets, spatial_shapes, self.num_points)
        weights = weights.unflatten(3, (self.num_levels, self.num_points))
        out = self.output_proj(sampled(value.unflatten(2, (self.num_heads, -1)), spatial_shapes, places, weights))
        return out if self.batch_first else out.transpose(0, 1)
