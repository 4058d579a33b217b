"""Relative attention's backward pass: once over the keys for what each query's row sums up to, once more for dQ and the
positions' gradients; then, by blocks of keys, once over the queries for dK and dV.

`relative_attention` has the formulas and launches the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels._relative_index import (
    COUNTS,
    column_biases,
    key_places,
    load_block,
    query_places,
    row_biases,
    window_corner,
)
from magnet_fast.kernels._runtime import dot, rounded
from magnet_fast.kernels._window_index import LOG2E, load_keys, load_tokens, store_pad, store_tokens, token_offsets


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    by_row,  # (B, HEADS, window_h, H * W) float32, times log2(e)
    by_column,  # (B, HEADS, H * W, window_w) float32, times log2(e)
    grad_out,  # (B, H, W, CHANNELS), any strides but the last
    log_totals,  # written: (B, HEADS, H * W) float32, of each query: base-2 log-sum-exp of its logits
    means,  # the same: rowsum(P * dO V^T)
    stride_image,
    stride_y,
    stride_x,
    grad_stride_image,  # of grad_out
    grad_stride_y,
    grad_stride_x,
    height,
    width,
    rows,  # of windows
    columns,
    window_h,
    window_w,
    blocks,  # tiles of queries of a window
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    head = tl.program_id(0) // blocks % HEADS
    sizes = (height, width, rows, columns, window_h, window_w)
    corner = window_corner(tl.program_id(0) // blocks // HEADS, sizes)
    first_query = tl.program_id(0) % blocks * QUERIES
    if first_query >= corner[3] * corner[4]:
        return  # windows at the bottom and right have fewer queries
    strides = (stride_image, stride_y, stride_x)
    image, tokens = corner[0].to(tl.int64), height * width
    qkv += image * stride_image + head * D
    if PAD:
        pad += head * D
    here = image * HEADS + head
    by_row += here * tokens * window_h
    by_column += here * tokens * window_w

    y, x, real = query_places(corner, first_query, QUERIES)
    token = y * width + x
    query = load_tokens(qkv, token_offsets(y, x, strides), real, D, D_TILE)
    from_grad = grad_out + image * grad_stride_image + head * D
    grad = load_tokens(from_grad, y * grad_stride_y + x * grad_stride_x, real, D, D_TILE)

    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES,), tl.float32)
    for first_x in range(0, window_w, KEY_COLUMNS):
        across = column_biases(by_column, token, window_w, first_x, KEY_ROWS, KEY_COLUMNS, False)
        for first_y in range(0, window_h, KEY_ROWS):
            key, value = load_block(
                qkv, pad, corner, sizes, strides, first_y, first_x, KEY_ROWS, KEY_COLUMNS, CHANNELS, D, D_TILE, PAD
            )
            bias = across + row_biases(by_row, token, tokens, window_h, first_y, KEY_ROWS, KEY_COLUMNS, False)
            logits = dot(query, tl.trans(key), None, PRECISION) * scale + bias
            grad_weights = dot(grad, tl.trans(value), None, PRECISION)
            before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp2(logits - base[:, None])
            kept = tl.exp2(before - base)
            total = total * kept + tl.sum(weights, 1)
            mean = mean * kept + tl.sum(weights * grad_weights, 1)
    log_total = largest + tl.log2(total)
    mean /= total
    tl.store(log_totals + here * tokens + token, log_total, mask=real)
    tl.store(means + here * tokens + token, mean, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def backward_queries_kernel(
    qkv,
    pad,
    by_row,
    by_column,
    grad_out,
    log_totals,
    means,
    grad_query,  # (B, H, W, CHANNELS) float32 contiguous: what the keys give to dQ; or None
    grad_by_row,  # like by_row, not times log2(e); or None
    grad_by_column,  # like by_column; or None
    stride_image,
    stride_y,
    stride_x,
    grad_stride_image,
    grad_stride_y,
    grad_stride_x,
    height,
    width,
    rows,
    columns,
    window_h,
    window_w,
    blocks,  # tiles of queries of a window
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLUMNS
    head = tl.program_id(0) // blocks % HEADS
    sizes = (height, width, rows, columns, window_h, window_w)
    corner = window_corner(tl.program_id(0) // blocks // HEADS, sizes)
    first_query = tl.program_id(0) % blocks * QUERIES
    if first_query >= corner[3] * corner[4]:
        return  # windows at the bottom and right have fewer queries
    strides = (stride_image, stride_y, stride_x)
    image, tokens = corner[0].to(tl.int64), height * width
    qkv += image * stride_image + head * D
    if PAD:
        pad += head * D
    here = image * HEADS + head
    by_row += here * tokens * window_h
    by_column += here * tokens * window_w

    y, x, real = query_places(corner, first_query, QUERIES)
    token = y * width + x
    query = load_tokens(qkv, token_offsets(y, x, strides), real, D, D_TILE)
    from_grad = grad_out + image * grad_stride_image + head * D
    grad = load_tokens(from_grad, y * grad_stride_y + x * grad_stride_x, real, D, D_TILE)

    log_total = tl.load(log_totals + here * tokens + token, mask=real, other=float("inf"))
    mean = tl.load(means + here * tokens + token, mask=real, other=0.0)
    grad_tile = tl.zeros((QUERIES, D_TILE), tl.float32)
    for first_x in range(0, window_w, KEY_COLUMNS):
        # What another column of blocks has stored is added to below: by then every thread must see it.
        tl.debug_barrier()
        across = column_biases(by_column, token, window_w, first_x, KEY_ROWS, KEY_COLUMNS, False)
        grad_across = tl.zeros((QUERIES, KEYS), tl.float32)
        for first_y in range(0, window_h, KEY_ROWS):
            key, value = load_block(
                qkv, pad, corner, sizes, strides, first_y, first_x, KEY_ROWS, KEY_COLUMNS, CHANNELS, D, D_TILE, PAD
            )
            bias = across + row_biases(by_row, token, tokens, window_h, first_y, KEY_ROWS, KEY_COLUMNS, False)
            logits = dot(query, tl.trans(key), None, PRECISION) * scale + bias
            weights = tl.exp2(logits - log_total[:, None])
            grad_logits = weights * (dot(grad, tl.trans(value), None, PRECISION) - mean[:, None])
            if grad_by_row is not None:
                if KEY_ROWS == 1:
                    sums = tl.sum(grad_logits, 1)[:, None]
                else:
                    sums = tl.sum(tl.reshape(grad_logits, (QUERIES, KEY_ROWS, KEY_COLUMNS)), 2)
                key_y = first_y + tl.arange(0, KEY_ROWS)
                to = grad_by_row + here * tokens * window_h + ((key_y * tokens)[None, :] + token[:, None])
                there = real[:, None] & (key_y < window_h)[None, :]
                sums += tl.load(to, mask=there & (first_x > 0), other=0.0)
                tl.store(to, sums, mask=there)
            if grad_by_column is not None:
                grad_across += grad_logits
            if grad_query is not None:
                grad_tile = dot(rounded(grad_logits, query.dtype), key, grad_tile, PRECISION)
        if grad_by_column is not None:
            if KEY_ROWS > 1:  # noqa: SIM108 - constant
                sums = tl.sum(tl.reshape(grad_across, (QUERIES, KEY_ROWS, KEY_COLUMNS)), 1)
            else:
                sums = grad_across
            key_x = first_x + tl.arange(0, KEY_COLUMNS)
            to = grad_by_column + here * tokens * window_w + ((token * window_w)[:, None] + key_x[None, :])
            tl.store(to, sums, mask=real[:, None] & (key_x < window_w)[None, :])
    if grad_query is not None:
        to = grad_query + image * tokens * CHANNELS + head * D + token * CHANNELS
        store_tokens(to, real, grad_tile * (scale / LOG2E), D, D_TILE)


@triton.jit(do_not_specialize=COUNTS)
def backward_keys_kernel(
    qkv,
    pad,
    by_row,
    by_column,
    grad_out,
    log_totals,
    means,
    grad_qkv,  # (B, H, W, 3 * CHANNELS) contiguous: dK and dV; or None
    pad_parts,  # (windows * blocks, 2, CHANNELS) float32: dK and dV summed over a block's padded tokens; or None
    stride_image,
    stride_y,
    stride_x,
    grad_stride_image,
    grad_stride_y,
    grad_stride_x,
    height,
    width,
    rows,
    columns,
    window_h,
    window_w,
    blocks,  # of keys of a window
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLUMNS
    head = tl.program_id(0) // blocks % HEADS
    window, block = tl.program_id(0) // blocks // HEADS, tl.program_id(0) % blocks
    sizes = (height, width, rows, columns, window_h, window_w)
    corner = window_corner(window, sizes)
    strides = (stride_image, stride_y, stride_x)
    image, tokens = corner[0].to(tl.int64), height * width
    qkv += image * stride_image + head * D
    if PAD:
        pad += head * D
    here = image * HEADS + head
    by_row += here * tokens * window_h
    by_column += here * tokens * window_w
    log_totals += here * tokens
    means += here * tokens
    grad_out += image * grad_stride_image + head * D

    across_blocks = (window_w + KEY_COLUMNS - 1) // KEY_COLUMNS
    first_y, first_x = block // across_blocks * KEY_ROWS, block % across_blocks * KEY_COLUMNS
    y, x, key_real, inside = key_places(corner, sizes, first_y, first_x, KEY_ROWS, KEY_COLUMNS)
    key, value = load_keys(qkv, pad, token_offsets(y, x, strides), key_real, inside, CHANNELS, D, D_TILE, PAD)
    grad_key = tl.zeros((KEYS, D_TILE), tl.float32)
    grad_value = tl.zeros((KEYS, D_TILE), tl.float32)
    for first_query in range(0, corner[3] * corner[4], QUERIES):
        query_y, query_x, real = query_places(corner, first_query, QUERIES)
        token = query_y * width + query_x
        query = load_tokens(qkv, token_offsets(query_y, query_x, strides), real, D, D_TILE)
        grad = load_tokens(grad_out, query_y * grad_stride_y + query_x * grad_stride_x, real, D, D_TILE)
        # Lanes without a query have no weight.
        log_total = tl.load(log_totals + token, mask=real, other=float("inf"))
        mean = tl.load(means + token, mask=real, other=0.0)
        bias = column_biases(by_column, token, window_w, first_x, KEY_ROWS, KEY_COLUMNS, True)
        bias += row_biases(by_row, token, tokens, window_h, first_y, KEY_ROWS, KEY_COLUMNS, True)
        logits = dot(key, tl.trans(query), None, PRECISION) * scale + bias
        weights = tl.exp2(logits - log_total[None, :])
        grad_value = dot(rounded(weights, query.dtype), grad, grad_value, PRECISION)
        grad_logits = weights * (dot(value, tl.trans(grad), None, PRECISION) - mean[None, :])
        grad_key = dot(rounded(grad_logits, query.dtype), query, grad_key, PRECISION)
    grad_key *= scale / LOG2E

    if grad_qkv is not None:
        to = grad_qkv + image * tokens * (3 * CHANNELS) + head * D + (y * width + x) * (3 * CHANNELS)
        store_tokens(to + CHANNELS, key_real, grad_key, D, D_TILE)
        store_tokens(to + 2 * CHANNELS, key_real, grad_value, D, D_TILE)
    if pad_parts is not None:
        padded = (inside & ~key_real)[:, None]
        store_pad(
            pad_parts + (window.to(tl.int64) * blocks + block) * (2 * CHANNELS) + head * D,
            tl.sum(tl.where(padded, grad_key, 0.0), 0),
            tl.sum(tl.where(padded, grad_value, 0.0), 0),
            CHANNELS,
            D,
            D_TILE,
        )
