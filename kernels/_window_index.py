"""Where a window's tokens lie in the map, and the bias between them: roll, padding, partition and mask as arithmetic.

A window's tokens are counted row by row and taken in pieces, whose sides are powers of two as Triton wants them. Lanes
of a piece beyond the window repeat its last token, so that nothing infinite arises in them, and count as not real.
"""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels._runtime import dot, rounded

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Changing values of these are not worth another compilation.
COUNTS = ["height", "width", "rows", "columns", "shift_h", "shift_w", "roll_h", "roll_w", "windows", "programs"]


@triton.jit
def window_place(window, rows, columns):
    """(image, row of windows, column of windows, cut, 0) of the window with this number.

    cut has bit 1 in the last row of windows and bit 0 in the last column: only there does the shift put together what
    was apart before. Of Swin's three regions an axis, the first ends where the last window begins. The 0 is one that
    the compiler cannot know: what is computed from it stays in the loop over windows, and takes no registers outside.
    """
    image = window // (rows * columns)
    inside = window - image * (rows * columns)
    window_y = inside // columns
    window_x = inside - window_y * columns
    cut = 2 * (window_y == rows - 1).to(tl.int32) + (window_x == columns - 1).to(tl.int32)
    return image, window_y, window_x, cut, tl.minimum(window, 0)


@triton.jit
def again(place, number):
    """The same place with another 0: what is loaded from it is loaded once more, and not kept for another number >= 0.

    float32 streams its operands so. A product takes each in two pieces, and all of a tile's tokens for every warp: the
    compiler would keep these pieces through a loop, and spill.
    """
    return place[0], place[1], place[2], place[3], tl.minimum(place[0] + number, 0)


@triton.jit
def shift_sides(FIRST, TILE: tl.constexpr, shift_h, shift_w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """On which side of a cut TILE tokens from FIRST on lie: bit 1 below the horizontal, bit 0 beside the vertical one.
    Two tokens of a window see each other if these agree in the bits of the window's cut."""
    token = tl.minimum(FIRST + tl.arange(0, TILE), WINDOW_H * WINDOW_W - 1)
    below = token >= (WINDOW_H - shift_h) * WINDOW_W
    beside = token % WINDOW_W >= WINDOW_W - shift_w
    return 2 * below.to(tl.int32) + beside.to(tl.int32)


@triton.jit
def token_places(
    place,  # what window_place returned
    geometry,  # (height, width, rows, columns, roll_h, roll_w, shift_h, shift_w)
    FIRST,
    TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
):
    """Of TILE tokens from FIRST on: y and x on the map, whether they are tokens of the map, and of the window.

    The roll comes as geometry's roll_h and roll_w, which lie within what is rolled: the padded map, or the map.
    """
    height, width, rows, columns, roll_h, roll_w, shift_h, shift_w = geometry
    token = FIRST + place[4] + tl.arange(0, TILE)
    inside = token < WINDOW_H * WINDOW_W
    real = inside
    token = tl.minimum(token, WINDOW_H * WINDOW_W - 1)
    y = place[1] * WINDOW_H + token // WINDOW_W
    x = place[2] * WINDOW_W + token % WINDOW_W
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
    return y, x, real, inside


@triton.jit
def token_offsets(y, x, strides):
    """Offsets of tokens within their image, in elements: these fit into 32 bits, those of images do not."""
    return y * strides[1] + x * strides[2]


@triton.jit
def load_tokens(pointer, offsets, real, D: tl.constexpr, D_TILE: tl.constexpr):
    """(tokens, D_TILE): the channels of one head from each token; 0 where a token is not real, and beyond D."""
    channel = tl.arange(0, D_TILE)
    mask = real[:, None]
    if D < D_TILE:
        mask = mask & (channel < D)[None, :]
    return tl.load(pointer + offsets[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile(
    pointer,
    place,
    geometry,
    strides,
    FIRST,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
):
    """`load_tokens` of TILE tokens of a window from FIRST on."""
    y, x, real, _ = token_places(place, geometry, FIRST, TILE, WINDOW_H, WINDOW_W, PAD_FIRST)
    return load_tokens(pointer, token_offsets(y, x, strides), real, D, D_TILE)


@triton.jit
def store_tokens(pointers, real, values, D: tl.constexpr, D_TILE: tl.constexpr):
    """Writes the channels of one head to each real token."""
    channel = tl.arange(0, D_TILE)
    mask = real[:, None]
    if D < D_TILE:
        mask = mask & (channel < D)[None, :]
    tl.store(pointers[:, None] + channel[None, :], rounded(values, pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    qkv,  # q of this head in the image's token (0, 0)
    pad,  # q of this head in a padded token
    offsets,
    real,
    inside,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    PAD: tl.constexpr,
):
    """Keys and values (tokens, D_TILE), those of padded tokens included; 0 for lanes beyond the window."""
    tokens = qkv + offsets
    mask = real
    if PAD:
        tokens = tl.where(real, tokens, pad)
        mask = inside
    mask = mask[:, None]
    channel = tl.arange(0, D_TILE)
    if D < D_TILE:
        mask = mask & (channel < D)[None, :]
    pointers = tokens[:, None] + channel[None, :]
    keys = tl.load(pointers + CHANNELS, mask=mask, other=0.0)
    return keys, tl.load(pointers + 2 * CHANNELS, mask=mask, other=0.0)


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
        bias = tl.where((key_lane <= LAST)[:, None], bias, float("-inf"))
    else:
        bias = tl.load(table + (query_part[:, None] - key_part[None, :])).to(tl.float32) * LOG2E
        bias = tl.where((key_lane <= LAST)[None, :], bias, float("-inf"))
    return bias


@triton.jit
def load_piece(
    qkv,
    pad,
    place,
    geometry,
    strides,
    FIRST,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
):
    """Keys and values (KEYS, D_TILE) from token FIRST of a window on."""
    y, x, real, inside = token_places(place, geometry, FIRST, KEYS, WINDOW_H, WINDOW_W, PAD_FIRST)
    offsets = token_offsets(y, x, strides)
    return load_keys(qkv, pad, offsets, real, inside, CHANNELS, D, D_TILE, PAD)


@triton.jit
def relative_logits(
    query,  # (QUERIES, D_TILE)
    key,  # (KEYS, D_TILE)
    bias,  # (QUERIES, KEYS), or (KEYS, QUERIES) with KEYS_FIRST
    place,
    geometry,
    scale,
    FIRST_QUERY,
    FIRST_KEY,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """In the shape of bias: similarity times log2(e), -infinity where the window's cut separates query and key."""
    if KEYS_FIRST:
        logits = dot(key, tl.trans(query), None, PRECISION) * scale + bias
    else:
        logits = dot(query, tl.trans(key), None, PRECISION) * scale + bias
    if SHIFTED:  # noqa: SIM102 - constant, and not
        if place[3] != 0:
            query_side = shift_sides(FIRST_QUERY + place[4], QUERIES, geometry[6], geometry[7], WINDOW_H, WINDOW_W)
            key_side = shift_sides(FIRST_KEY + place[4], KEYS, geometry[6], geometry[7], WINDOW_H, WINDOW_W)
            if KEYS_FIRST:
                apart = (key_side[:, None] ^ query_side[None, :]) & place[3]
            else:
                apart = (query_side[:, None] ^ key_side[None, :]) & place[3]
            logits = tl.where(apart == 0, logits, float("-inf"))
    return logits


@triton.jit
def has_padding(place, geometry, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, PAD_FIRST: tl.constexpr):
    """False only for windows without a padded token."""
    bottom, right = place[1] * WINDOW_H + WINDOW_H, place[2] * WINDOW_W + WINDOW_W
    if PAD_FIRST:
        bottom += geometry[4]
        right += geometry[5]
    return (bottom > geometry[0]) | (right > geometry[1])


@triton.jit
def store_pad(part, grad_pad_key, grad_pad_value, CHANNELS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr):
    """Writes a program's sums of dK and dV over padded tokens."""
    channel = tl.arange(0, D_TILE)
    tl.store(part + channel, grad_pad_key, mask=channel < D)
    tl.store(part + CHANNELS + channel, grad_pad_value, mask=channel < D)
