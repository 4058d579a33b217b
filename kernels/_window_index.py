"""Where a window's tokens lie in the map, and the bias between them: roll, padding, partition and mask as arithmetic.

A window's tokens are counted row by row and taken in pieces, whose sides are powers of two as Triton wants them. Lanes
of a piece beyond the window repeat its last token, so that nothing infinite arises in them, and count as not real.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._runtime import rounded

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def window_place(window, rows, columns):
    """(image, row of windows, column of windows) of the window with this number."""
    image = window // (rows * columns)
    inside = window - image * (rows * columns)
    window_y = inside // columns
    return image, window_y, inside - window_y * columns


@triton.jit
def token_places(
    place,  # (image, row of windows, column of windows)
    geometry,  # (height, width, rows, columns, shift_h, shift_w, roll_h, roll_w)
    FIRST,
    TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
):
    """Of TILE tokens from FIRST on: y and x on the map, whether they are tokens of the map, regions after the shift.

    The roll comes as geometry's roll_h and roll_w, which lie within what is rolled: the padded map, or the map.
    """
    image, window_y, window_x = place
    height, width, rows, columns, shift_h, shift_w, roll_h, roll_w = geometry
    token = FIRST + tl.arange(0, TILE)
    real = token < WINDOW_H * WINDOW_W
    token = tl.minimum(token, WINDOW_H * WINDOW_W - 1)
    y = window_y * WINDOW_H + token // WINDOW_W
    x = window_x * WINDOW_W + token % WINDOW_W
    # Of Swin's three regions an axis, the first ends where the last window begins; so within a window only the cut at
    # length - shift separates anything.
    region = 2 * (y >= rows * WINDOW_H - shift_h).to(tl.int32) + (x >= columns * WINDOW_W - shift_w).to(tl.int32)
    if PAD_FIRST:
        rolled_h, rolled_w = rows * WINDOW_H, columns * WINDOW_W
    else:
        real = real & (y < height) & (x < width)
        rolled_h, rolled_w = height, width
    y += roll_h
    x += roll_w
    y = tl.where(y >= rolled_h, y - rolled_h, y)
    x = tl.where(x >= rolled_w, x - rolled_w, x)
    if PAD_FIRST:
        real = real & (y < height) & (x < width)
    return y, x, real, region


@triton.jit
def token_offsets(image, y, x, strides):
    """Offsets of tokens in elements, in 64 bits; strides of image, y and x."""
    return image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@triton.jit
def load_tokens(pointer, offsets, real, D: tl.constexpr, D_TILE: tl.constexpr):
    """(tokens, D_TILE): the channels of one head from each token; 0 where a token is not real, and beyond D."""
    channel = tl.arange(0, D_TILE)
    mask = real[:, None]
    if D < D_TILE:
        mask = mask & (channel < D)[None, :]
    return tl.load(pointer + offsets[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(pointer, offsets, real, values, D: tl.constexpr, D_TILE: tl.constexpr):
    """Writes the channels of one head to each real token."""
    channel = tl.arange(0, D_TILE)
    mask = real[:, None]
    if D < D_TILE:
        mask = mask & (channel < D)[None, :]
    tl.store(pointer + offsets[:, None] + channel[None, :], rounded(values, pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    key,  # pointer to k of this head in token (0, 0, 0)
    value,
    pad_key,  # (D_TILE): k of this head in a padded token
    pad_value,
    offsets,
    real,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    PAD: tl.constexpr,
):
    """Keys and values (tokens, D_TILE), those of padded tokens included."""
    keys = load_tokens(key, offsets, real, D, D_TILE)
    values = load_tokens(value, offsets, real, D, D_TILE)
    if PAD:
        keys = tl.where(real[:, None], keys, pad_key[None, :])
        values = tl.where(real[:, None], values, pad_value[None, :])
    return keys, values


@triton.jit
def load_channels(pointer, D: tl.constexpr, D_TILE: tl.constexpr):
    """(D_TILE): the channels of one head from one token; 0 beyond D."""
    channel = tl.arange(0, D_TILE)
    return tl.load(pointer + channel, mask=channel < D, other=0.0)


@triton.jit
def relative_bias(
    table,  # this head's entries of the bias table, ((2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    FIRST_QUERY,
    FIRST_KEY,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """(QUERIES, KEYS), or (KEYS, QUERIES) with KEYS_FIRST, in float32: the bias times log2(e), and -infinity for lanes
    of keys beyond the window."""
    LAST: tl.constexpr = WINDOW_H * WINDOW_W - 1
    ROW: tl.constexpr = 2 * WINDOW_W - 1
    query = tl.minimum(FIRST_QUERY + tl.arange(0, QUERIES), LAST)
    key_lane = FIRST_KEY + tl.arange(0, KEYS)
    key = tl.minimum(key_lane, LAST)
    # The table's row for (query - key) is a difference of one number for the query and one for the key.
    query_part = (query // WINDOW_W + WINDOW_H - 1) * ROW + query % WINDOW_W + WINDOW_W - 1
    key_part = (key // WINDOW_W) * ROW + key % WINDOW_W
    if KEYS_FIRST:
        bias = tl.load(table + (query_part[None, :] - key_part[:, None])).to(tl.float32) * LOG2E
        return tl.where((key_lane <= LAST)[:, None], bias, float("-inf"))
    bias = tl.load(table + (query_part[:, None] - key_part[None, :])).to(tl.float32) * LOG2E
    return tl.where((key_lane <= LAST)[None, :], bias, float("-inf"))
