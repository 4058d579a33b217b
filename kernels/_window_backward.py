"""Window attention's backward pass for windows that one program holds, and what both kinds of windows end with.

`window_attention` has the formulas and launches the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from magnet_fast.kernels._runtime import dot, rounded
from magnet_fast.kernels._window_index import (
    COUNTS,
    LOG2E,
    has_padding,
    load_keys,
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
def backward_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    grad_out,  # (B, H, W, CHANNELS), any strides but the last
    grad_qkv,  # (B, H, W, 3 * CHANNELS) contiguous; or None
    slabs,  # (programs, HEADS, N, N) float32: the bias' gradient, summed over each program's windows; or None
    pad_parts,  # (programs, 2, CHANNELS) float32: dK and dV of padded tokens, in the same way; or None
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
    TILE: tl.constexpr,  # holds the window's tokens
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % HEADS
    program = tl.program_id(0) // HEADS
    geometry = (height, width, rows, columns, roll_h, roll_w, shift_h, shift_w)
    strides = (stride_image, stride_y, stride_x)
    grad_strides = (grad_stride_image, grad_stride_y, grad_stride_x)
    grad_qkv_strides = (height.to(tl.int64) * width * (3 * CHANNELS), width * (3 * CHANNELS), 3 * CHANNELS)
    qkv += head * D
    grad_out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    if PAD:
        pad += head * D
    bias = relative_bias(table, 0, 0, TILE, TILE, WINDOW_H, WINDOW_W, False)
    if slabs is not None:
        grad_bias = tl.zeros((TILE, TILE), tl.float32)
    if pad_parts is not None:
        grad_pad_key = tl.zeros((D_TILE,), tl.float32)
        grad_pad_value = tl.zeros((D_TILE,), tl.float32)

    for window in range(program, windows, programs):
        place = window_place(window, rows, columns)
        image = place[0].to(tl.int64)
        image_qkv = qkv + image * stride_image
        image_grad = grad_out + image * grad_stride_image
        y, x, real, inside = token_places(place, geometry, 0, TILE, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = token_offsets(y, x, strides)
        query = load_tokens(image_qkv, offsets, real, D, D_TILE)
        grad = load_tokens(image_grad, token_offsets(y, x, grad_strides), real, D, D_TILE)
        key, value = load_keys(image_qkv, pad, offsets, real, inside, CHANNELS, D, D_TILE, PAD)
        logits = relative_logits(
            query, key, bias, place, geometry, scale, 0, 0, TILE, TILE, WINDOW_H, WINDOW_W, False, SHIFTED, PRECISION
        )
        weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]

        # What is needed no longer is written at once: registers are what limits this kernel.
        padded = has_padding(place, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        if grad_qkv is not None:
            to = grad_qkv + image * grad_qkv_strides[0] + head * D + token_offsets(y, x, grad_qkv_strides)
        if grad_qkv is not None or pad_parts is not None:
            grad_value = dot(tl.trans(rounded(weights, query.dtype)), grad, None, PRECISION)
            if grad_qkv is not None:
                store_tokens(to + 2 * CHANNELS, real, grad_value, D, D_TILE)
            if pad_parts is not None:  # noqa: SIM102 - constant, and not
                if padded:
                    grad_pad_value += tl.sum(tl.where(real[:, None], 0.0, grad_value), 0)
        grad_weights = dot(grad, tl.trans(value), None, PRECISION)
        grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
        if slabs is not None:
            grad_bias += grad_logits
        low = rounded(grad_logits, query.dtype)
        if grad_qkv is not None:
            grad_query = dot(low, key, None, PRECISION) * (scale / LOG2E)
            store_tokens(to, real, grad_query, D, D_TILE)
        if grad_qkv is not None or pad_parts is not None:
            grad_key = dot(tl.trans(low), query, None, PRECISION) * (scale / LOG2E)
            if grad_qkv is not None:
                store_tokens(to + CHANNELS, real, grad_key, D, D_TILE)
            if pad_parts is not None:  # noqa: SIM102 - constant, and not
                if padded:
                    grad_pad_key += tl.sum(tl.where(real[:, None], 0.0, grad_key), 0)

    if slabs is not None:
        slab = slabs + (program.to(tl.int64) * HEADS + head) * TOKENS * TOKENS
        lane = tl.arange(0, TILE)
        mask = (lane < TOKENS)[:, None] & (lane < TOKENS)[None, :]
        tl.store(slab + lane[:, None] * TOKENS + lane[None, :], grad_bias, mask=mask)
    if pad_parts is not None:
        store_pad(
            pad_parts + program.to(tl.int64) * (2 * CHANNELS) + head * D,
            grad_pad_key,
            grad_pad_value,
            CHANNELS,
            D,
            D_TILE,
        )


@triton.jit
def table_kernel(
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
