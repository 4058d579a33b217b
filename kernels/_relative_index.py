"""Where the tokens of relative attention's windows lie, and the positions' part of their logits.

The queries of a window are those of its tokens that are tokens of the map, row by row. Its keys come in blocks of
KEY_ROWS rows by KEY_COLUMNS columns: all queries of a tile share the rows and columns that a block needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels._window_index import load_keys, token_offsets, window_place

# Changing values of these are not worth another compilation.
COUNTS = ["height", "width", "rows", "columns", "window_h", "window_w", "blocks"]


@triton.jit
def window_corner(window, sizes):
    """(image, y, x, real_h, real_w) of the window with this number: its first token, and how many rows and columns of
    its tokens are the map's."""
    height, width, rows, columns, window_h, window_w = sizes
    image, window_y, window_x, _, _ = window_place(window, rows, columns)
    y, x = window_y * window_h, window_x * window_w
    return image, y, x, tl.minimum(window_h, height - y), tl.minimum(window_w, width - x)


@triton.jit
def query_places(corner, FIRST, QUERIES: tl.constexpr):
    """Of QUERIES queries from FIRST on: y and x on the map, and which exist. Others repeat the last one."""
    lane = FIRST + tl.arange(0, QUERIES)
    count = corner[3] * corner[4]
    real = lane < count
    lane = tl.minimum(lane, count - 1)
    return corner[1] + lane // corner[4], corner[2] + lane % corner[4], real


@triton.jit
def key_places(corner, sizes, first_y, first_x, KEY_ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr):
    """Of the block of keys at (first_y, first_x) of a window: y and x on the map, whether they are tokens of the map,
    and of the window."""
    height, width, _, _, window_h, window_w = sizes
    lane = tl.arange(0, KEY_ROWS * KEY_COLUMNS)
    y, x = first_y + lane // KEY_COLUMNS, first_x + lane % KEY_COLUMNS
    inside = (y < window_h) & (x < window_w)
    y, x = corner[1] + y, corner[2] + x
    return y, x, inside & (y < height) & (x < width), inside


@triton.jit
def load_block(
    qkv,  # q of this head in the image's token (0, 0)
    pad,
    corner,
    sizes,
    strides,
    first_y,
    first_x,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    PAD: tl.constexpr,
):
    """Keys and values (keys, D_TILE) of a block, those of padded tokens included; 0 for lanes beyond the window."""
    y, x, real, inside = key_places(corner, sizes, first_y, first_x, KEY_ROWS, KEY_COLUMNS)
    return load_keys(qkv, pad, token_offsets(y, x, strides), real, inside, CHANNELS, D, D_TILE, PAD)


@triton.jit
def row_biases(
    by_row,  # (window_h, tokens) float32 of an image's head
    token,  # of the map, each query's
    tokens,
    window_h,
    first_y,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """What a block's keys owe to their rows, (queries, keys), or (keys, queries) with KEYS_FIRST: one number a query
    where the block is a single row. -infinity for rows beyond the window."""
    if KEY_ROWS == 1:
        found = tl.load(by_row + first_y * tokens + token)
        bias = found[None, :] if KEYS_FIRST else found[:, None]
    else:
        y = first_y + tl.arange(0, KEY_ROWS * KEY_COLUMNS) // KEY_COLUMNS
        if KEYS_FIRST:
            pointers = by_row + ((y * tokens)[:, None] + token[None, :])
            bias = tl.load(pointers, mask=(y < window_h)[:, None], other=float("-inf"))
        else:
            pointers = by_row + ((y * tokens)[None, :] + token[:, None])
            bias = tl.load(pointers, mask=(y < window_h)[None, :], other=float("-inf"))
    return bias


@triton.jit
def column_biases(
    by_column,  # (tokens, window_w) float32 of an image's head
    token,
    window_w,
    first_x,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """What a block's keys owe to their columns, in the shape of `row_biases`: the same for every block below it."""
    x = first_x + tl.arange(0, KEY_ROWS * KEY_COLUMNS) % KEY_COLUMNS
    if KEYS_FIRST:
        pointers = by_column + ((token * window_w)[None, :] + x[:, None])
        bias = tl.load(pointers, mask=(x < window_w)[:, None], other=float("-inf"))
    else:
        pointers = by_column + ((token * window_w)[:, None] + x[None, :])
        bias = tl.load(pointers, mask=(x < window_w)[None, :], other=float("-inf"))
    return bias
