"""Swin's window attention in one pass: a program keeps its part of one head's bias on chip and walks over many windows.

``softmax(scale * q k^T + bias) v`` per window and head, read from and written to the unpadded, unshifted map; the
softmax is taken to base 2, with log2(e) folded into scale and bias. The backward pass recomputes the probabilities P:
``dV = P^T dO``, ``dS = P * (dO V^T - rowsum(P * dO V^T))``, ``dQ = scale * dS K``, ``dK = scale * dS^T Q``, and the
bias' gradient is the sum of dS over windows, which stays on chip until the program ends. Nothing is added to with
atomics: programs write partial sums, which are added in a fixed order.

A program takes a tile of a window's N queries, and all keys in one or two pieces (144 = 128 + 16), so that few lanes
are idle. Up to N = 64 the tile is the whole window, and one backward kernel gives everything. Above, its programs give
dQ and the bias' gradient, and those of a second kernel, each with a tile of keys, give dK and dV.

Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import Autotuner, dot, grid, input_precision, multiprocessors, on_device, power_of_two, rounded
from ._window_index import (
    LOG2E,
    load_channels,
    load_keys,
    load_tokens,
    relative_bias,
    store_tokens,
    token_offsets,
    token_places,
    window_place,
)

LARGEST_WINDOW = 256
"""Tokens of a window that the kernels take."""

# Changing values of these are not worth another compilation.
_COUNTS = ["height", "width", "rows", "columns", "shift_h", "shift_w", "roll_h", "roll_w", "windows", "programs"]


@triton.jit(do_not_specialize=_COUNTS)
def _forward_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    out,  # (B, H, W, CHANNELS) contiguous
    stride_image,
    stride_y,
    stride_x,
    height,
    width,
    rows,  # of windows
    columns,
    shift_h,
    shift_w,
    roll_h,  # the shift within what is rolled: the padded map, or the map
    roll_w,
    windows,  # B * rows * columns
    programs,  # that share the windows of one head and tile
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    KEYS_A: tl.constexpr,  # of the first piece
    KEYS_B: tl.constexpr,  # of the second, or 0
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,  # there are padded tokens, and a pad to make them of
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    first_query = (tl.program_id(0) % TILES) * QUERIES
    head = tl.program_id(0) // TILES % HEADS
    geometry = (height, width, rows, columns, shift_h, shift_w, roll_h, roll_w)
    strides = (stride_image, stride_y, stride_x)
    out_strides = (height.to(tl.int64) * width * CHANNELS, width * CHANNELS, CHANNELS)
    qkv += head * D
    out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    pad_key, pad_value = None, None
    if PAD:
        pad_key = load_channels(pad + CHANNELS + head * D, D, D_TILE)
        pad_value = load_channels(pad + 2 * CHANNELS + head * D, D, D_TILE)
    bias_a = relative_bias(table, first_query, 0, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
    if KEYS_B > 0:
        bias_b = relative_bias(table, first_query, KEYS_A, QUERIES, KEYS_B, WINDOW_H, WINDOW_W, False)

    for window in range(tl.program_id(0) // (TILES * HEADS), windows, programs):
        place = window_place(window, rows, columns)
        y, x, real, region = token_places(place, geometry, first_query, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = token_offsets(place[0], y, x, strides)
        query = load_tokens(qkv, offsets, real, D, D_TILE)
        if TILES == 1:
            offsets_a, real_a, region_a = offsets, real, region
        else:
            y_a, x_a, real_a, region_a = token_places(place, geometry, 0, KEYS_A, WINDOW_H, WINDOW_W, PAD_FIRST)
            offsets_a = token_offsets(place[0], y_a, x_a, strides)
        key_a, value_a = load_keys(
            qkv + CHANNELS, qkv + 2 * CHANNELS, pad_key, pad_value, offsets_a, real_a, D, D_TILE, PAD
        )
        logits_a = _logits(query, key_a, region, region_a, bias_a, scale, SHIFTED, PRECISION)
        largest = tl.max(logits_a, 1)
        if KEYS_B > 0:
            y_b, x_b, real_b, region_b = token_places(place, geometry, KEYS_A, KEYS_B, WINDOW_H, WINDOW_W, PAD_FIRST)
            offsets_b = token_offsets(place[0], y_b, x_b, strides)
            key_b, value_b = load_keys(
                qkv + CHANNELS, qkv + 2 * CHANNELS, pad_key, pad_value, offsets_b, real_b, D, D_TILE, PAD
            )
            logits_b = _logits(query, key_b, region, region_b, bias_b, scale, SHIFTED, PRECISION)
            largest = tl.maximum(largest, tl.max(logits_b, 1))
        weights_a = tl.exp2(logits_a - largest[:, None])
        total = tl.sum(weights_a, 1)
        result = dot(rounded(weights_a, query.dtype), value_a, None, PRECISION)
        if KEYS_B > 0:
            weights_b = tl.exp2(logits_b - largest[:, None])
            total += tl.sum(weights_b, 1)
            result = dot(rounded(weights_b, query.dtype), value_b, result, PRECISION)
        store_tokens(out, token_offsets(place[0], y, x, out_strides), real, result / total[:, None], D, D_TILE)


@triton.jit
def _logits(query, key, query_region, key_region, bias, scale, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    """(rows of query, rows of key): similarity times log2(e), -infinity between regions. Serves with key and query
    exchanged, too."""
    logits = dot(query, tl.trans(key), None, PRECISION) * scale + bias
    if SHIFTED:
        logits = tl.where(query_region[:, None] == key_region[None, :], logits, float("-inf"))
    return logits


@triton.jit(do_not_specialize=_COUNTS)
def _backward_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    grad_out,  # (B, H, W, CHANNELS), any strides but the last
    grad_qkv,  # (B, H, W, 3 * CHANNELS) contiguous: dQ, with one tile dK and dV as well; or None
    slabs,  # (programs, HEADS, N, N) float32: the bias' gradient, summed over each program's windows; or None
    pad_parts,  # (programs, 2, CHANNELS) float32: dK and dV of padded tokens, in the same way; or None
    statistics,  # (2, HEADS, B * H * W) float32: base-2 log-sum-exp and rowsum(P * dP) of queries; or None
    stride_image,
    stride_y,
    stride_x,
    grad_stride_image,  # of grad_out
    grad_stride_y,
    grad_stride_x,
    height,
    width,
    rows,
    columns,
    shift_h,
    shift_w,
    roll_h,
    roll_w,
    windows,
    programs,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    first_query = (tl.program_id(0) % TILES) * QUERIES
    head = tl.program_id(0) // TILES % HEADS
    program = tl.program_id(0) // (TILES * HEADS)
    geometry = (height, width, rows, columns, shift_h, shift_w, roll_h, roll_w)
    strides = (stride_image, stride_y, stride_x)
    grad_strides = (grad_stride_image, grad_stride_y, grad_stride_x)
    grad_qkv_strides = (height.to(tl.int64) * width * (3 * CHANNELS), width * (3 * CHANNELS), 3 * CHANNELS)
    qkv += head * D
    grad_out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    if grad_qkv is not None:
        grad_qkv += head * D
    pad_key, pad_value = None, None
    if PAD:
        pad_key = load_channels(pad + CHANNELS + head * D, D, D_TILE)
        pad_value = load_channels(pad + 2 * CHANNELS + head * D, D, D_TILE)
    bias_a = relative_bias(table, first_query, 0, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
    if KEYS_B > 0:
        bias_b = relative_bias(table, first_query, KEYS_A, QUERIES, KEYS_B, WINDOW_H, WINDOW_W, False)
    if slabs is not None:
        grad_bias_a = tl.zeros((QUERIES, KEYS_A), tl.float32)
        if KEYS_B > 0:
            grad_bias_b = tl.zeros((QUERIES, KEYS_B), tl.float32)
    if pad_parts is not None:
        grad_pad_key = tl.zeros((D_TILE,), tl.float32)
        grad_pad_value = tl.zeros((D_TILE,), tl.float32)

    for window in range(program, windows, programs):
        place = window_place(window, rows, columns)
        y, x, real, region = token_places(place, geometry, first_query, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = token_offsets(place[0], y, x, strides)
        query = load_tokens(qkv, offsets, real, D, D_TILE)
        grad = load_tokens(grad_out, token_offsets(place[0], y, x, grad_strides), real, D, D_TILE)
        if TILES == 1:
            offsets_a, real_a, region_a = offsets, real, region
        else:
            y_a, x_a, real_a, region_a = token_places(place, geometry, 0, KEYS_A, WINDOW_H, WINDOW_W, PAD_FIRST)
            offsets_a = token_offsets(place[0], y_a, x_a, strides)
        key_a, value_a = load_keys(
            qkv + CHANNELS, qkv + 2 * CHANNELS, pad_key, pad_value, offsets_a, real_a, D, D_TILE, PAD
        )
        logits_a = _logits(query, key_a, region, region_a, bias_a, scale, SHIFTED, PRECISION)
        largest = tl.max(logits_a, 1)
        if KEYS_B > 0:
            y_b, x_b, real_b, region_b = token_places(place, geometry, KEYS_A, KEYS_B, WINDOW_H, WINDOW_W, PAD_FIRST)
            offsets_b = token_offsets(place[0], y_b, x_b, strides)
            key_b, value_b = load_keys(
                qkv + CHANNELS, qkv + 2 * CHANNELS, pad_key, pad_value, offsets_b, real_b, D, D_TILE, PAD
            )
            logits_b = _logits(query, key_b, region, region_b, bias_b, scale, SHIFTED, PRECISION)
            largest = tl.maximum(largest, tl.max(logits_b, 1))
        total = tl.sum(tl.exp2(logits_a - largest[:, None]), 1)
        if KEYS_B > 0:
            total += tl.sum(tl.exp2(logits_b - largest[:, None]), 1)
        log_total = largest + tl.log2(total)

        weights_a = tl.exp2(logits_a - log_total[:, None])
        grad_weights_a = dot(grad, tl.trans(value_a), None, PRECISION)
        mean = tl.sum(weights_a * grad_weights_a, 1)
        if KEYS_B > 0:
            weights_b = tl.exp2(logits_b - log_total[:, None])
            grad_weights_b = dot(grad, tl.trans(value_b), None, PRECISION)
            mean += tl.sum(weights_b * grad_weights_b, 1)
        grad_logits_a = weights_a * (grad_weights_a - mean[:, None])
        if KEYS_B > 0:
            grad_logits_b = weights_b * (grad_weights_b - mean[:, None])
        if slabs is not None:
            grad_bias_a += grad_logits_a
            if KEYS_B > 0:
                grad_bias_b += grad_logits_b

        if grad_qkv is not None:
            to = token_offsets(place[0], y, x, grad_qkv_strides)
            low_a = rounded(grad_logits_a, query.dtype)
            grad_query = dot(low_a, key_a, None, PRECISION)
            if KEYS_B > 0:
                grad_query = dot(rounded(grad_logits_b, query.dtype), key_b, grad_query, PRECISION)
            store_tokens(grad_qkv, to, real, grad_query * (scale / LOG2E), D, D_TILE)
        if statistics is not None:
            token = (place[0].to(tl.int64) * height + y) * width + x
            images = windows // (rows * columns)
            of_head = head * images.to(tl.int64) * height * width
            tl.store(statistics + of_head + token, log_total, mask=real)
            tl.store(statistics + HEADS * images.to(tl.int64) * height * width + of_head + token, mean, mask=real)
        if TILES == 1 and (grad_qkv is not None or pad_parts is not None):
            low_weights = rounded(weights_a, query.dtype)
            grad_value = dot(tl.trans(low_weights), grad, None, PRECISION)
            grad_key = dot(tl.trans(rounded(grad_logits_a, query.dtype)), query, None, PRECISION) * (scale / LOG2E)
            if grad_qkv is not None:
                store_tokens(grad_qkv + CHANNELS, to, real, grad_key, D, D_TILE)
                store_tokens(grad_qkv + 2 * CHANNELS, to, real, grad_value, D, D_TILE)
            if pad_parts is not None:
                grad_pad_key += tl.sum(tl.where(real[:, None], 0.0, grad_key), 0)
                grad_pad_value += tl.sum(tl.where(real[:, None], 0.0, grad_value), 0)

    if slabs is not None:
        slab = slabs + (program.to(tl.int64) * HEADS + head) * TOKENS * TOKENS
        query_lane = first_query + tl.arange(0, QUERIES)
        _store_slab(slab, query_lane, tl.arange(0, KEYS_A), grad_bias_a, TOKENS)
        if KEYS_B > 0:
            _store_slab(slab, query_lane, KEYS_A + tl.arange(0, KEYS_B), grad_bias_b, TOKENS)
    if pad_parts is not None:
        channel = tl.arange(0, D_TILE)
        part = pad_parts + program.to(tl.int64) * (2 * CHANNELS) + head * D
        tl.store(part + channel, grad_pad_key, mask=channel < D)
        tl.store(part + CHANNELS + channel, grad_pad_value, mask=channel < D)


@triton.jit
def _store_slab(slab, query_lane, key_lane, values, TOKENS: tl.constexpr):
    """Writes one piece of a program's (N, N) sums."""
    mask = (query_lane < TOKENS)[:, None] & (key_lane < TOKENS)[None, :]
    tl.store(slab + query_lane[:, None] * TOKENS + key_lane[None, :], values, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _backward_keys_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    grad_out,  # (B, H, W, CHANNELS), any strides but the last
    grad_qkv,  # (B, H, W, 3 * CHANNELS) contiguous: dK and dV; or None
    pad_parts,  # (programs * tiles of keys, 2, CHANNELS) float32: dK and dV of padded tokens; or None
    statistics,  # (2, HEADS, B * H * W) float32: what _backward_kernel wrote
    stride_image,
    stride_y,
    stride_x,
    grad_stride_image,  # of grad_out
    grad_stride_y,
    grad_stride_x,
    height,
    width,
    rows,
    columns,
    shift_h,
    shift_w,
    roll_h,
    roll_w,
    windows,
    programs,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    KEYS: tl.constexpr,  # of a tile
    QUERIES_A: tl.constexpr,  # of the first piece
    QUERIES_B: tl.constexpr,  # of the second
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TILES: tl.constexpr = (WINDOW_H * WINDOW_W + KEYS - 1) // KEYS
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    program = tl.program_id(0) // (TILES * HEADS)
    geometry = (height, width, rows, columns, shift_h, shift_w, roll_h, roll_w)
    strides = (stride_image, stride_y, stride_x)
    grad_strides = (grad_stride_image, grad_stride_y, grad_stride_x)
    grad_qkv_strides = (height.to(tl.int64) * width * (3 * CHANNELS), width * (3 * CHANNELS), 3 * CHANNELS)
    tokens = (windows // (rows * columns)).to(tl.int64) * height * width
    qkv += head * D
    grad_out += head * D
    statistics += head * tokens
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    if grad_qkv is not None:
        grad_qkv += head * D
    pad_key, pad_value = None, None
    if PAD:
        pad_key = load_channels(pad + CHANNELS + head * D, D, D_TILE)
        pad_value = load_channels(pad + 2 * CHANNELS + head * D, D, D_TILE)
    bias_a = relative_bias(table, 0, tile * KEYS, QUERIES_A, KEYS, WINDOW_H, WINDOW_W, True)
    bias_b = relative_bias(table, QUERIES_A, tile * KEYS, QUERIES_B, KEYS, WINDOW_H, WINDOW_W, True)
    if pad_parts is not None:
        grad_pad_key = tl.zeros((D_TILE,), tl.float32)
        grad_pad_value = tl.zeros((D_TILE,), tl.float32)

    for window in range(program, windows, programs):
        place = window_place(window, rows, columns)
        y, x, real, region = token_places(place, geometry, tile * KEYS, KEYS, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = token_offsets(place[0], y, x, strides)
        key, value = load_keys(qkv + CHANNELS, qkv + 2 * CHANNELS, pad_key, pad_value, offsets, real, D, D_TILE, PAD)
        grad_key = tl.zeros((KEYS, D_TILE), tl.float32)
        grad_value = tl.zeros((KEYS, D_TILE), tl.float32)
        grad_key, grad_value = _add_queries(
            grad_key, grad_value, key, value, region, bias_a, qkv, grad_out, statistics, place, geometry, strides,
            grad_strides, tokens, scale, 0, QUERIES_A, HEADS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, SHIFTED,
            PRECISION,
        )  # fmt: skip
        grad_key, grad_value = _add_queries(
            grad_key, grad_value, key, value, region, bias_b, qkv, grad_out, statistics, place, geometry, strides,
            grad_strides, tokens, scale, QUERIES_A, QUERIES_B, HEADS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, SHIFTED,
            PRECISION,
        )  # fmt: skip
        grad_key *= scale / LOG2E
        if grad_qkv is not None:
            to = token_offsets(place[0], y, x, grad_qkv_strides)
            store_tokens(grad_qkv + CHANNELS, to, real, grad_key, D, D_TILE)
            store_tokens(grad_qkv + 2 * CHANNELS, to, real, grad_value, D, D_TILE)
        if pad_parts is not None:
            grad_pad_key += tl.sum(tl.where(real[:, None], 0.0, grad_key), 0)
            grad_pad_value += tl.sum(tl.where(real[:, None], 0.0, grad_value), 0)

    if pad_parts is not None:
        channel = tl.arange(0, D_TILE)
        part = pad_parts + (program * TILES + tile).to(tl.int64) * (2 * CHANNELS) + head * D
        tl.store(part + channel, grad_pad_key, mask=channel < D)
        tl.store(part + CHANNELS + channel, grad_pad_value, mask=channel < D)


@triton.jit
def _add_queries(
    grad_key,  # (KEYS, D_TILE) float32
    grad_value,
    key,  # (KEYS, D_TILE)
    value,
    key_region,
    bias,  # (KEYS, QUERIES)
    qkv,
    grad_out,
    statistics,
    place,
    geometry,
    strides,
    grad_strides,
    tokens,  # B * H * W
    scale,
    FIRST: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one piece of queries adds to dK (but for the scale) and dV of a tile of keys."""
    y, x, real, region = token_places(place, geometry, FIRST, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
    query = load_tokens(qkv, token_offsets(place[0], y, x, strides), real, D, D_TILE)
    grad = load_tokens(grad_out, token_offsets(place[0], y, x, grad_strides), real, D, D_TILE)
    token = (place[0].to(tl.int64) * geometry[0] + y) * geometry[1] + x
    # Infinite, for what is no query: its weights become 0.
    log_total = tl.load(statistics + token, mask=real, other=float("inf"))
    mean = tl.load(statistics + HEADS * tokens + token, mask=real, other=0.0)
    logits = _logits(key, query, key_region, region, bias, scale, SHIFTED, PRECISION)
    weights = tl.exp2(logits - log_total[None, :])
    grad_value = dot(rounded(weights, query.dtype), grad, grad_value, PRECISION)
    grad_logits = weights * (dot(value, tl.trans(grad), None, PRECISION) - mean[None, :])
    grad_key = dot(rounded(grad_logits, query.dtype), query, grad_key, PRECISION)
    return grad_key, grad_value


@triton.jit
def _table_kernel(
    grad_bias,  # (HEADS, N, N) float32
    grad_table,  # ((2 * WINDOW_H - 1) * (2 * WINDOW_W - 1), HEADS) contiguous
    HEADS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Each entry of the table gets the sum over the pairs of query and key that read it."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    LENGTH: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    BLOCKS: tl.constexpr = (LENGTH + ENTRIES - 1) // ENTRIES
    head = tl.program_id(0) // BLOCKS
    entry = (tl.program_id(0) % BLOCKS) * ENTRIES + tl.arange(0, ENTRIES)
    apart_y = entry // (2 * WINDOW_W - 1) - (WINDOW_H - 1)
    apart_x = entry % (2 * WINDOW_W - 1) - (WINDOW_W - 1)
    total = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, TOKENS, QUERIES):
        query = first + tl.arange(0, QUERIES)
        key_y = (query // WINDOW_W)[:, None] - apart_y[None, :]
        key_x = (query % WINDOW_W)[:, None] - apart_x[None, :]
        pair = (query < TOKENS)[:, None] & (entry < LENGTH)[None, :]
        pair = pair & (key_y >= 0) & (key_y < WINDOW_H) & (key_x >= 0) & (key_x < WINDOW_W)
        of_pair = (head * TOKENS + query[:, None]) * TOKENS + key_y * WINDOW_W + key_x
        total += tl.sum(tl.load(grad_bias + of_pair, mask=pair, other=0.0), 0)
    to = grad_table + entry * HEADS + head
    tl.store(to, rounded(total, grad_table.dtype.element_ty), mask=entry < LENGTH)


def window_attention_forward(
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: bool,
) -> Tensor:
    """The forward pass; arguments as `magnet_fast.ops.window_attention`'s, checked already.

    Args:
        qkv: (B, H, W, 3 * C), float32, bfloat16 or float16; last dimension contiguous, other strides free.
        bias_table: ((2 * window_h - 1) * (2 * window_w - 1), num_heads).
        pad_qkv: (3 * C), or None for zeros.

    Returns:
        (B, H, W, C) contiguous, dtype of ``qkv``.
    """
    call = _Call(qkv, bias_table, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))

    def launch(config: triton.Config) -> None:
        programs = call.programs(config, "QUERIES")
        _forward_kernel[call.grid(config, "QUERIES", programs)](
            qkv, call.table, call.pad, out, *qkv.stride()[:3], *call.geometry, call.windows, programs, call.scale,
            **call.constants, **_options(config),
        )  # fmt: skip

    with on_device(qkv):
        _forward_autotuner(launch, qkv.device, *call.key)
    return out


def window_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``qkv``, ``bias_table`` and ``pad_qkv`` in their shapes and dtypes, None for those not wanted.

    Args:
        grad_out: (B, H, W, C), any strides.
        wanted: for each of the three, whether it is.
    """
    call = _Call(qkv, bias_table, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
    if grad_out.stride(3) != 1:  # for one, the expanded gradient of a sum
        grad_out = grad_out.contiguous()
    # Without padded tokens the padding token's gradient is 0; q of padded tokens has none in any case.
    want_qkv, want_table, want_pad = wanted[0], wanted[1], bool(wanted[2] and call.padded)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if want_qkv else None
    tokens, channels = window_h * window_w, call.channels
    whole = tokens <= _LARGEST_TILE
    statistics = None
    if not whole and (want_qkv or want_pad):
        statistics = torch.empty(2, num_heads, qkv.shape[:3].numel(), dtype=torch.float32, device=qkv.device)

    def launch_queries(config: triton.Config) -> tuple[Tensor | None, Tensor | None]:
        programs = call.programs(config, "QUERIES")
        slabs = _float32(qkv, programs, num_heads, tokens, tokens) if want_table else None
        pad_parts = _float32(qkv, programs, 2, channels) if want_pad and whole else None
        _backward_kernel[call.grid(config, "QUERIES", programs)](
            qkv, call.table, call.pad, grad_out, grad_qkv, slabs, pad_parts, statistics, *qkv.stride()[:3],
            *grad_out.stride()[:3], *call.geometry, call.windows, programs, call.scale, **call.constants,
            **_options(config),
        )  # fmt: skip
        return slabs, pad_parts

    def launch_keys(config: triton.Config) -> Tensor | None:
        programs = call.programs(config, "KEYS")
        pad_parts = _float32(qkv, programs * call.tiles(config, "KEYS"), 2, channels) if want_pad else None
        _backward_keys_kernel[call.grid(config, "KEYS", programs)](
            qkv, call.table, call.pad, grad_out, grad_qkv, pad_parts, statistics, *qkv.stride()[:3],
            *grad_out.stride()[:3], *call.geometry, call.windows, programs, call.scale, **call.constants,
            **_options(config),
        )  # fmt: skip
        return pad_parts

    grad_table = grad_pad = slabs = pad_parts = None
    with on_device(qkv):
        if want_qkv or want_table or want_pad:
            slabs, pad_parts = _backward_autotuner(launch_queries, qkv.device, *call.key, want_qkv, want_table)
        if statistics is not None:
            pad_parts = _backward_keys_autotuner(launch_keys, qkv.device, *call.key)
        if want_table:
            grad_table = torch.empty(bias_table.shape, dtype=bias_table.dtype, device=qkv.device)
            _table_kernel[grid(num_heads * triton.cdiv(bias_table.shape[0], _ENTRIES))](
                slabs.sum(0), grad_table, num_heads, window_h, window_w, _ENTRIES, QUERIES=64
            )
    if wanted[2] and pad_qkv is not None:
        grad_pad = torch.zeros(pad_qkv.shape, dtype=pad_qkv.dtype, device=qkv.device)
        if pad_parts is not None:
            grad_pad[channels:] = pad_parts.sum(0).flatten()
    return [grad_qkv, grad_table, grad_pad]


_LARGEST_TILE = 64
_ENTRIES = 16


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class _Call:
    """What the passes have in common: a call's tensors as the kernels read them, its sizes and constants."""

    def __init__(
        self,
        qkv: Tensor,
        bias_table: Tensor,
        pad_qkv: Tensor | None,
        num_heads: int,
        window_h: int,
        window_w: int,
        shift_h: int,
        shift_w: int,
        scale: float,
        pad_first: bool,
    ) -> None:
        batch, height, width, channels = qkv.shape
        rows, columns = -(-height // window_h), -(-width // window_w)
        rolled_h, rolled_w = (rows * window_h, columns * window_w) if pad_first else (height, width)
        self.device = qkv.device
        self.channels, d = channels // 3, channels // 3 // num_heads
        self.tokens, self.windows = window_h * window_w, batch * rows * columns
        self.padded = (height, width) != (rows * window_h, columns * window_w)
        self.geometry = (height, width, rows, columns, shift_h, shift_w, shift_h % rolled_h, shift_w % rolled_w)
        self.scale = scale * LOG2E.value
        self.table = bias_table.t().contiguous()
        self.pad = None if pad_qkv is None else pad_qkv.to(qkv.dtype).contiguous()
        self.constants = {
            "HEADS": num_heads,
            "D": d,
            "D_TILE": power_of_two(d),
            "WINDOW_H": window_h,
            "WINDOW_W": window_w,
            "PAD_FIRST": pad_first,
            "PAD": self.padded and pad_qkv is not None,
            "SHIFTED": bool(shift_h or shift_w),
            "PRECISION": input_precision(qkv.dtype),
        }
        self.key = (self.tokens, d, qkv.dtype, self.constants["PRECISION"])

    def tiles(self, config: triton.Config, side: str) -> int:
        """Into how many tiles of queries or keys a configuration cuts a window."""
        return triton.cdiv(self.tokens, config.kwargs[side])

    def programs(self, config: triton.Config, side: str) -> int:
        """How many programs share a head's windows: enough to fill the device, all but one with equally many."""
        wanted = multiprocessors(self.device) * config.kwargs["RESIDENT"]
        wanted = triton.cdiv(wanted, self.constants["HEADS"] * self.tiles(config, side))
        return triton.cdiv(self.windows, triton.cdiv(self.windows, min(wanted, self.windows)))

    def grid(self, config: triton.Config, side: str, programs: int) -> tuple[int]:
        return grid(programs * self.constants["HEADS"] * self.tiles(config, side))


def _options(config: triton.Config) -> dict[str, object]:
    """What of a configuration goes to the kernel: all but how many programs a multiprocessor should have."""
    return {name: value for name, value in config.all_kwargs().items() if name != "RESIDENT"}


def _pieces(tokens: int) -> tuple[int, int]:
    """A window's tokens as one or two powers of two of at least 16: few lanes beyond the window."""
    covering = power_of_two(tokens)
    if covering <= _LARGEST_TILE:
        return covering, 0
    first = covering // 2
    return first, power_of_two(tokens - first)


def _forward_candidates(tokens: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    """Configurations by tokens of a window, head width and dtype, the best guess first."""
    keys_a, keys_b = _pieces(tokens)
    tile = min(_LARGEST_TILE, power_of_two(tokens))
    sizes = {"QUERIES": tile, "KEYS_A": keys_a, "KEYS_B": keys_b, "RESIDENT": 2}
    return [triton.Config(sizes, num_warps=4, num_stages=1)]


def _backward_candidates(
    tokens: int, d: int, dtype: torch.dtype, precision: str, want_qkv: bool, want_table: bool
) -> Sequence[triton.Config]:
    keys_a, keys_b = _pieces(tokens)
    tile = min(_LARGEST_TILE, power_of_two(tokens))
    sizes = {"QUERIES": tile, "KEYS_A": keys_a, "KEYS_B": keys_b, "RESIDENT": 2}
    return [triton.Config(sizes, num_warps=4 if keys_b == 0 else 8, num_stages=1)]


def _backward_keys_candidates(tokens: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    queries_a, queries_b = _pieces(tokens)
    sizes = {"KEYS": 64, "QUERIES_A": queries_a, "QUERIES_B": queries_b, "RESIDENT": 2}
    return [triton.Config(sizes, num_warps=8, num_stages=1)]


_forward_autotuner = Autotuner(_forward_candidates, _forward_kernel)
_backward_autotuner = Autotuner(_backward_candidates, _backward_kernel)
_backward_keys_autotuner = Autotuner(_backward_keys_candidates, _backward_keys_kernel)


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that :mod:`.report` compiles: windows and head widths, shifted and padded, on meta tensors."""
    sizes = [(7, 32), (8, 32), (12, 32), (16, 32), (7, 16), (12, 16), (7, 64), (12, 64), (16, 64)]
    for side, d in [(7, 32), (12, 32)] if quick else sizes:
        heads, shift = 4, side // 2
        qkv = torch.empty(16, 30, 30, 3 * heads * d, dtype=dtype, device="meta")
        table = torch.empty((2 * side - 1) ** 2, heads, dtype=dtype, device="meta")
        pad = torch.empty(3 * heads * d, dtype=dtype, device="meta")
        arguments = (qkv, table, pad, heads, side, side, shift, shift, d**-0.5, True)
        grad = torch.empty(16, 30, 30, heads * d, dtype=dtype, device="meta")
        yield f"w {side}, d {d}", functools.partial(window_attention_forward, *arguments)
        yield f"w {side}, d {d}", functools.partial(window_attention_backward, grad, *arguments, (True, True, True))
