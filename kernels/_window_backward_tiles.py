"""Window attention's backward pass for windows in tiles: dQ by tiles of queries, dK, dV and dBias by tiles of keys.

`window_attention` has the formulas and launches the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels._runtime import dot, rounded
from magnet_fast.kernels._window_index import (
    COUNTS,
    LOG2E,
    again,
    has_padding,
    load_keys,
    load_piece,
    load_tile,
    load_tokens,
    relative_bias,
    relative_logits,
    store_pad,
    store_tokens,
    token_offsets,
    token_places,
    window_place,
)


@triton.jit(do_not_specialize=COUNTS)
def backward_queries_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    grad_out,  # (B, H, W, CHANNELS), any strides but the last
    grad_qkv,  # (B, H, W, 3 * CHANNELS) contiguous: dQ; or None
    statistics,  # (2, HEADS, windows, N) float32: of each query, base-2 log-sum-exp and rowsum(P * dO V^T)
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
    KEYS_A: tl.constexpr,  # of the first piece; of each one in float32
    KEYS_B: tl.constexpr,
    KEYS_C: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    STREAMED: tl.constexpr = qkv.dtype.element_ty == tl.float32
    first_query = (tl.program_id(0) % TILES) * QUERIES
    head = tl.program_id(0) // TILES % HEADS
    geometry = (height, width, rows, columns, roll_h, roll_w, shift_h, shift_w)
    strides = (stride_image, stride_y, stride_x)
    grad_strides = (grad_stride_image, grad_stride_y, grad_stride_x)
    grad_qkv_strides = (height.to(tl.int64) * width * (3 * CHANNELS), width * (3 * CHANNELS), 3 * CHANNELS)
    qkv += head * D
    grad_out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    if PAD:
        pad += head * D
    if not STREAMED:
        bias_a = relative_bias(table, first_query, 0, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
        if KEYS_B > 0:
            bias_b = relative_bias(table, first_query, KEYS_A, QUERIES, KEYS_B, WINDOW_H, WINDOW_W, False)
        if KEYS_C > 0:
            bias_c = relative_bias(table, first_query, KEYS_A + KEYS_B, QUERIES, KEYS_C, WINDOW_H, WINDOW_W, False)

    for window in range(tl.program_id(0) // (TILES * HEADS), windows, programs):
        place = window_place(window, rows, columns)
        image = place[0].to(tl.int64)
        image_qkv = qkv + image * stride_image
        y, x, real, inside = token_places(place, geometry, first_query, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
        query = load_tokens(image_qkv, token_offsets(y, x, strides), real, D, D_TILE)
        image_grad = grad_out + image * grad_stride_image
        grad = load_tokens(image_grad, token_offsets(y, x, grad_strides), real, D, D_TILE)
        if not STREAMED:
            key_a, value_a = load_piece(
                image_qkv, pad, place, geometry, strides, 0, KEYS_A, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W,
                PAD_FIRST, PAD,
            )  # fmt: skip
            if KEYS_B > 0:
                key_b, value_b = load_piece(
                    image_qkv, pad, place, geometry, strides, KEYS_A, KEYS_B, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W,
                    PAD_FIRST, PAD,
                )  # fmt: skip
            if KEYS_C > 0:
                key_c, value_c = load_piece(
                    image_qkv, pad, place, geometry, strides, KEYS_A + KEYS_B, KEYS_C, CHANNELS, D, D_TILE, WINDOW_H,
                    WINDOW_W, PAD_FIRST, PAD,
                )  # fmt: skip

        # Once over the keys for what a query's row sums up to, and once more for dQ: the logits of all keys and the
        # bias would not fit into the registers.
        largest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mean = tl.zeros((QUERIES,), tl.float32)
        if STREAMED:
            for first in range(0, TOKENS + place[4], KEYS_A):
                bias = relative_bias(table, first_query, first, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
                query, grad, key, value = _load_again(
                    image_qkv, image_grad, pad, again(place, first), geometry, strides, grad_strides, first_query,
                    first, QUERIES, KEYS_A, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD,
                )  # fmt: skip
                largest, total, mean = _sum_up(
                    largest, total, mean, query, grad, key, value, bias, place, geometry, scale, first_query, first,
                    QUERIES, KEYS_A, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                )  # fmt: skip
        else:
            largest, total, mean = _sum_up(
                largest, total, mean, query, grad, key_a, value_a, bias_a, place, geometry, scale, first_query, 0,
                QUERIES, KEYS_A, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
            )  # fmt: skip
            if KEYS_B > 0:
                largest, total, mean = _sum_up(
                    largest, total, mean, query, grad, key_b, value_b, bias_b, place, geometry, scale, first_query,
                    KEYS_A, QUERIES, KEYS_B, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                )  # fmt: skip
            if KEYS_C > 0:
                largest, total, mean = _sum_up(
                    largest, total, mean, query, grad, key_c, value_c, bias_c, place, geometry, scale, first_query,
                    KEYS_A + KEYS_B, QUERIES, KEYS_C, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                )  # fmt: skip
        # A padded token is no query: its weights become 0.
        log_total = tl.where(real, largest + tl.log2(total), float("inf"))
        mean = tl.where(real, mean / total, 0.0)
        lane = first_query + tl.arange(0, QUERIES)
        row = statistics + (head * windows.to(tl.int64) + window) * TOKENS + lane
        tl.store(row, log_total, mask=lane < TOKENS)
        tl.store(row + HEADS * windows.to(tl.int64) * TOKENS, mean, mask=lane < TOKENS)
        if grad_qkv is not None:
            # Loaded again: the compiler would keep the first pass' logits rather than compute them twice.
            query = load_tokens(image_qkv, token_offsets(y, x, strides) + place[4], real, D, D_TILE)
            grad_query = tl.zeros((QUERIES, D_TILE), tl.float32)
            if STREAMED:
                for first in range(0, TOKENS + place[4], KEYS_A):
                    bias = relative_bias(table, first_query, first, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
                    query, grad, key, value = _load_again(
                        image_qkv, image_grad, pad, again(place, first + 1), geometry, strides, grad_strides,
                        first_query, first, QUERIES, KEYS_A, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD,
                    )  # fmt: skip
                    grad_query = _add_keys(
                        grad_query, query, grad, key, value, bias, log_total, mean, place, geometry, scale, first_query,
                        first, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                    )  # fmt: skip
            else:
                grad_query = _add_keys(
                    grad_query, query, grad, key_a, value_a, bias_a, log_total, mean, place, geometry, scale,
                    first_query, 0, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                )  # fmt: skip
                if KEYS_B > 0:
                    grad_query = _add_keys(
                        grad_query, query, grad, key_b, value_b, bias_b, log_total, mean, place, geometry, scale,
                        first_query, KEYS_A, QUERIES, KEYS_B, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                    )  # fmt: skip
                if KEYS_C > 0:
                    grad_query = _add_keys(
                        grad_query, query, grad, key_c, value_c, bias_c, log_total, mean, place, geometry, scale,
                        first_query, KEYS_A + KEYS_B, QUERIES, KEYS_C, WINDOW_H, WINDOW_W, SHIFTED, PRECISION,
                    )  # fmt: skip
            to = grad_qkv + head * D + image * grad_qkv_strides[0] + token_offsets(y, x, grad_qkv_strides)
            store_tokens(to, real, grad_query * (scale / LOG2E), D, D_TILE)


@triton.jit
def _load_again(
    qkv, grad_out, pad, place, geometry, strides, grad_strides, FIRST_QUERY, FIRST, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr, PAD_FIRST: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """(query, grad, key, value) of a tile of queries and a piece of keys."""
    query = load_tile(qkv, place, geometry, strides, FIRST_QUERY, QUERIES, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST)
    grad = load_tile(
        grad_out, place, geometry, grad_strides, FIRST_QUERY, QUERIES, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST
    )
    key, value = load_piece(
        qkv, pad, place, geometry, strides, FIRST, KEYS, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD
    )
    return query, grad, key, value


@triton.jit
def _sum_up(
    largest, total, mean, query, grad, key, value, bias, place, geometry, scale, FIRST_QUERY, FIRST,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of keys: the largest logit, the sum of the weights, and that of weights * dO V^T with it."""
    logits = relative_logits(
        query,
        key,
        bias,
        place,
        geometry,
        scale,
        FIRST_QUERY,
        FIRST,
        QUERIES,
        KEYS,
        WINDOW_H,
        WINDOW_W,
        False,
        SHIFTED,
        PRECISION,
    )
    before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(logits - base[:, None])
    kept = tl.exp2(before - base)
    total = total * kept + tl.sum(weights, 1)
    mean = mean * kept + tl.sum(weights * dot(grad, tl.trans(value), None, PRECISION), 1)
    return largest, total, mean


@triton.jit
def _add_keys(
    grad_query, query, grad, key, value, bias, log_total, mean, place, geometry, scale, FIRST_QUERY, FIRST,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one piece of keys adds to dQ, but for the scale."""
    logits = relative_logits(
        query,
        key,
        bias,
        place,
        geometry,
        scale,
        FIRST_QUERY,
        FIRST,
        QUERIES,
        KEYS,
        WINDOW_H,
        WINDOW_W,
        False,
        SHIFTED,
        PRECISION,
    )
    weights = tl.exp2(logits - log_total[:, None])
    grad_logits = weights * (dot(grad, tl.trans(value), None, PRECISION) - mean[:, None])
    return dot(rounded(grad_logits, query.dtype), key, grad_query, PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def backward_keys_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    grad_out,  # (B, H, W, CHANNELS), any strides but the last
    grad_qkv,  # (B, H, W, 3 * CHANNELS) contiguous: dK and dV; or None
    slabs,  # (programs, HEADS, N, N) float32: the bias' gradient, summed over each program's windows; or None
    pad_parts,  # (programs * tiles of keys, 2, CHANNELS) float32: dK and dV of padded tokens; or None
    statistics,  # (2, HEADS, windows, N) float32: what backward_queries_kernel wrote
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
    QUERIES_A: tl.constexpr,  # of the first piece; of each one in float32
    QUERIES_B: tl.constexpr,  # of the second, or 0
    QUERIES_C: tl.constexpr,  # of the third, or 0
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + KEYS - 1) // KEYS
    STREAMED: tl.constexpr = qkv.dtype.element_ty == tl.float32
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    program = tl.program_id(0) // (TILES * HEADS)
    first_key = tile * KEYS
    geometry = (height, width, rows, columns, roll_h, roll_w, shift_h, shift_w)
    strides = (stride_image, stride_y, stride_x)
    grad_strides = (grad_stride_image, grad_stride_y, grad_stride_x)
    grad_qkv_strides = (height.to(tl.int64) * width * (3 * CHANNELS), width * (3 * CHANNELS), 3 * CHANNELS)
    qkv += head * D
    grad_out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    if PAD:
        pad += head * D
    if slabs is not None:
        slab = slabs + (program.to(tl.int64) * HEADS + head) * TOKENS * TOKENS
    if slabs is not None and not STREAMED:
        grad_bias_a = tl.zeros((KEYS, QUERIES_A), tl.float32)
        if QUERIES_B > 0:
            grad_bias_b = tl.zeros((KEYS, QUERIES_B), tl.float32)
        if QUERIES_C > 0:
            grad_bias_c = tl.zeros((KEYS, QUERIES_C), tl.float32)
    if pad_parts is not None:
        grad_pad_key = tl.zeros((D_TILE,), tl.float32)
        grad_pad_value = tl.zeros((D_TILE,), tl.float32)

    for window in range(program, windows, programs):
        place = window_place(window, rows, columns)
        image = place[0].to(tl.int64)
        image_qkv = qkv + image * stride_image
        image_grad = grad_out + image * grad_stride_image
        y, x, real, inside = token_places(place, geometry, first_key, KEYS, WINDOW_H, WINDOW_W, PAD_FIRST)
        key, value = load_keys(image_qkv, pad, token_offsets(y, x, strides), real, inside, CHANNELS, D, D_TILE, PAD)
        totals = statistics + (head * windows.to(tl.int64) + window) * TOKENS
        means = totals + HEADS * windows.to(tl.int64) * TOKENS
        grad_key = tl.zeros((KEYS, D_TILE), tl.float32)
        grad_value = tl.zeros((KEYS, D_TILE), tl.float32)
        if STREAMED:
            for first in range(0, TOKENS + place[4], QUERIES_A):
                key, value = load_piece(
                    image_qkv, pad, again(place, first), geometry, strides, first_key, KEYS, CHANNELS, D, D_TILE,
                    WINDOW_H, WINDOW_W, PAD_FIRST, PAD,
                )  # fmt: skip
                grad_key, grad_value, grad_logits = _add_queries(
                    grad_key, grad_value, key, value, table, first_key, image_qkv, image_grad, totals, means, place,
                    geometry, strides, grad_strides, scale, first, QUERIES_A, KEYS, D, D_TILE, WINDOW_H, WINDOW_W,
                    PAD_FIRST, SHIFTED, PRECISION,
                )  # fmt: skip
                if slabs is not None:
                    _add_to_slab(slab, first_key, first, grad_logits, window == program, TOKENS, KEYS, QUERIES_A)
            # What a thread has added to the slab, another one may read for the next window.
            tl.debug_barrier()
        else:
            grad_key, grad_value, grad_logits = _add_queries(
                grad_key, grad_value, key, value, table, first_key, image_qkv, image_grad, totals, means, place,
                geometry, strides, grad_strides, scale, 0, QUERIES_A, KEYS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST,
                SHIFTED, PRECISION,
            )  # fmt: skip
            if slabs is not None:
                grad_bias_a += grad_logits
            if QUERIES_B > 0:
                grad_key, grad_value, grad_logits = _add_queries(
                    grad_key, grad_value, key, value, table, first_key, image_qkv, image_grad, totals, means, place,
                    geometry, strides, grad_strides, scale, QUERIES_A, QUERIES_B, KEYS, D, D_TILE, WINDOW_H, WINDOW_W,
                    PAD_FIRST, SHIFTED, PRECISION,
                )  # fmt: skip
                if slabs is not None:
                    grad_bias_b += grad_logits
            if QUERIES_C > 0:
                grad_key, grad_value, grad_logits = _add_queries(
                    grad_key, grad_value, key, value, table, first_key, image_qkv, image_grad, totals, means, place,
                    geometry, strides, grad_strides, scale, QUERIES_A + QUERIES_B, QUERIES_C, KEYS, D, D_TILE, WINDOW_H,
                    WINDOW_W, PAD_FIRST, SHIFTED, PRECISION,
                )  # fmt: skip
                if slabs is not None:
                    grad_bias_c += grad_logits
        grad_key *= scale / LOG2E
        if grad_qkv is not None:
            to = grad_qkv + head * D + image * grad_qkv_strides[0] + token_offsets(y, x, grad_qkv_strides)
            store_tokens(to + CHANNELS, real, grad_key, D, D_TILE)
            store_tokens(to + 2 * CHANNELS, real, grad_value, D, D_TILE)
        if pad_parts is not None:  # noqa: SIM102 - constant, and not
            if has_padding(place, geometry, WINDOW_H, WINDOW_W, PAD_FIRST):
                grad_pad_key += tl.sum(tl.where(real[:, None], 0.0, grad_key), 0)
                grad_pad_value += tl.sum(tl.where(real[:, None], 0.0, grad_value), 0)

    if slabs is not None and not STREAMED:
        _store_slab(slab, first_key, 0, grad_bias_a, TOKENS, KEYS, QUERIES_A)
        if QUERIES_B > 0:
            _store_slab(slab, first_key, QUERIES_A, grad_bias_b, TOKENS, KEYS, QUERIES_B)
        if QUERIES_C > 0:
            _store_slab(slab, first_key, QUERIES_A + QUERIES_B, grad_bias_c, TOKENS, KEYS, QUERIES_C)
    if pad_parts is not None:
        store_pad(
            pad_parts + (program * TILES + tile).to(tl.int64) * (2 * CHANNELS) + head * D,
            grad_pad_key,
            grad_pad_value,
            CHANNELS,
            D,
            D_TILE,
        )


@triton.jit
def _store_slab(
    slab, first_key, FIRST: tl.constexpr, values, TOKENS: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr
):
    """Writes one piece (KEYS, QUERIES) of a program's sums to its (N, N), where queries come first."""
    key = first_key + tl.arange(0, KEYS)
    query = FIRST + tl.arange(0, QUERIES)
    mask = (key < TOKENS)[:, None] & (query < TOKENS)[None, :]
    tl.store(slab + query[None, :] * TOKENS + key[:, None], values, mask=mask)


@triton.jit
def _add_to_slab(
    slab, first_key, FIRST, values, first_window, TOKENS: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr
):
    """Adds to one piece of a program's sums in memory, which nobody else reads or writes."""
    key = first_key + tl.arange(0, KEYS)
    query = FIRST + tl.arange(0, QUERIES)
    mask = (key < TOKENS)[:, None] & (query < TOKENS)[None, :]
    at = slab + query[None, :] * TOKENS + key[:, None]
    tl.store(at, tl.load(at, mask=mask & (not first_window), other=0.0) + values, mask=mask)


@triton.jit
def _add_queries(
    grad_key,  # (KEYS, D_TILE) float32
    grad_value,
    key,  # (KEYS, D_TILE)
    value,
    table,
    first_key,
    qkv,
    grad_out,
    totals,  # (N) float32: this window's queries' log-sum-exp
    means,
    place,
    geometry,
    strides,
    grad_strides,
    scale,
    FIRST,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one piece of queries adds to dK (but for the scale) and dV of a tile of keys, and dS (KEYS, QUERIES).

    The bias is gathered here: its gradient already takes the registers that it would take.
    """
    y, x, real, inside = token_places(place, geometry, FIRST, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
    query = load_tokens(qkv, token_offsets(y, x, strides), real, D, D_TILE)
    grad = load_tokens(grad_out, token_offsets(y, x, grad_strides), real, D, D_TILE)
    lane = FIRST + tl.arange(0, QUERIES)
    log_total = tl.load(totals + lane, mask=lane < WINDOW_H * WINDOW_W, other=float("inf"))
    mean = tl.load(means + lane, mask=lane < WINDOW_H * WINDOW_W, other=0.0)
    bias = relative_bias(table, FIRST + place[4], first_key + place[4], QUERIES, KEYS, WINDOW_H, WINDOW_W, True)
    logits = relative_logits(
        query,
        key,
        bias,
        place,
        geometry,
        scale,
        FIRST,
        first_key,
        QUERIES,
        KEYS,
        WINDOW_H,
        WINDOW_W,
        True,
        SHIFTED,
        PRECISION,
    )
    weights = tl.exp2(logits - log_total[None, :])
    grad_value = dot(rounded(weights, query.dtype), grad, grad_value, PRECISION)
    grad_logits = weights * (dot(value, tl.trans(grad), None, PRECISION) - mean[None, :])
    grad_key = dot(rounded(grad_logits, query.dtype), query, grad_key, PRECISION)
    return grad_key, grad_value, grad_logits
