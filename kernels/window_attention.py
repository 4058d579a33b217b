"""Swin's window attention in one pass: each program keeps one head's bias on chip and walks over many windows.

``softmax(scale * q k^T + bias) v`` per window and head, read from and written to the unpadded, unshifted map; the
softmax is taken to base 2 with log2(e) folded into scale and bias. The backward pass recomputes the probabilities P:
``dV = P^T dO``, ``dS = P * (dO V^T - rowsum(P * dO V^T))``, ``dQ = scale * dS K``, ``dK = scale * dS^T Q``, and the
bias' gradient is the sum of dS over windows, which stays on chip until the program ends. Nothing is added to with
atomics: programs write partial sums, which are added in a fixed order.

A window's N tokens are taken as up to three pieces of queries and two of keys (144 = 64 + 64 + 16 = 128 + 16), so
that few lanes are idle. Above N = 144 the bias no longer fits on chip: it is gathered for each piece of queries.

Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import Autotuner, dot, grid, input_precision, multiprocessors, on_device, power_of_two, rounded
from ._window_index import (
    LOG2E,
    bias_piece,
    load_channels,
    load_tokens,
    store_tokens,
    token_offsets,
    token_places,
    window_place,
)

LARGEST_WINDOW = 256
"""Tokens of a window that the kernels take."""

_COUNTS = ["height", "width", "rows", "columns", "shift_h", "shift_w", "roll_h", "roll_w", "windows", "programs"]


@triton.jit
def _load_keys(
    qkv,  # k of this head in token (0, 0, 0)
    pad_key,  # (D_TILE): this head's channels of a padded token
    pad_value,
    place,
    geometry,
    strides,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
):
    """Keys and values (KEYS, D_TILE) of one piece, their regions, offsets, and which are real."""
    y, x, real, region = token_places(place, geometry, FIRST, KEYS, WINDOW_H, WINDOW_W, PAD_FIRST)
    offsets = token_offsets(place[0], y, x, strides[0], strides[1], strides[2])
    key = load_tokens(qkv + CHANNELS, offsets, real, D, D_TILE)
    value = load_tokens(qkv + 2 * CHANNELS, offsets, real, D, D_TILE)
    if PAD:
        key = tl.where(real[:, None], key, pad_key[None, :])
        value = tl.where(real[:, None], value, pad_value[None, :])
    return key, value, region, y, x, real


@triton.jit
def _logits(query, key, query_region, key_region, bias, scale, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    """(queries, keys): similarity times log2(e), -infinity for keys of another region."""
    logits = dot(query, tl.trans(key), None, PRECISION) * scale + bias
    if SHIFTED:
        logits = tl.where(query_region[:, None] == key_region[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _attend(
    qkv,  # q of this head in token (0, 0, 0)
    out,  # this head's channels of token (0, 0, 0)
    table,
    bias_a,  # (QUERIES, KEYS_A), or None to gather it here
    bias_b,
    keys_a,  # what _load_keys returned
    keys_b,
    place,
    geometry,
    strides,
    scale,
    FIRST,
    QUERIES: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One piece of queries of one window, all keys."""
    y, x, real, region = token_places(place, geometry, FIRST, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
    offsets = token_offsets(place[0], y, x, strides[0], strides[1], strides[2])
    query = load_tokens(qkv, offsets, real, D, D_TILE)
    if bias_a is None:
        bias_a = bias_piece(table, FIRST, QUERIES, 0, KEYS_A, WINDOW_H, WINDOW_W)
        if KEYS_B > 0:
            bias_b = bias_piece(table, FIRST, QUERIES, KEYS_A, KEYS_B, WINDOW_H, WINDOW_W)

    logits_a = _logits(query, keys_a[0], region, keys_a[2], bias_a, scale, SHIFTED, PRECISION)
    largest = tl.max(logits_a, 1)
    if KEYS_B > 0:
        logits_b = _logits(query, keys_b[0], region, keys_b[2], bias_b, scale, SHIFTED, PRECISION)
        largest = tl.maximum(largest, tl.max(logits_b, 1))
    weights_a = tl.exp2(logits_a - largest[:, None])
    total = tl.sum(weights_a, 1)
    result = dot(rounded(weights_a, query.dtype), keys_a[1], None, PRECISION)
    if KEYS_B > 0:
        weights_b = tl.exp2(logits_b - largest[:, None])
        total += tl.sum(weights_b, 1)
        result = dot(rounded(weights_b, query.dtype), keys_b[1], result, PRECISION)

    out_row = geometry[1] * CHANNELS
    offsets = token_offsets(place[0], y, x, geometry[0].to(tl.int64) * out_row, out_row, CHANNELS)
    store_tokens(out, offsets, real, result / total[:, None], D, D_TILE)


@triton.jit(do_not_specialize=_COUNTS)
def _forward_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; unused without PAD
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
    programs,  # for each head
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    QUERIES_A: tl.constexpr,  # pieces of queries, one after the other; 0: none
    QUERIES_B: tl.constexpr,
    QUERIES_C: tl.constexpr,
    KEYS_A: tl.constexpr,  # pieces of keys
    KEYS_B: tl.constexpr,
    KEEP_BIAS: tl.constexpr,  # on chip; else pieces of QUERIES_A queries gather theirs in every window
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,  # there are padded tokens, and a pad to make them of
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % HEADS
    qkv += head * D
    out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    geometry = (height, width, rows, columns, shift_h, shift_w, roll_h, roll_w)
    strides = (stride_image, stride_y, stride_x)
    pad_key, pad_value = None, None
    if PAD:
        pad_key = load_channels(pad + CHANNELS + head * D, D, D_TILE)
        pad_value = load_channels(pad + 2 * CHANNELS + head * D, D, D_TILE)

    bias_aa, bias_ab, bias_ba, bias_bb, bias_ca, bias_cb = None, None, None, None, None, None
    if KEEP_BIAS:
        bias_aa = bias_piece(table, 0, QUERIES_A, 0, KEYS_A, WINDOW_H, WINDOW_W)
        if KEYS_B > 0:
            bias_ab = bias_piece(table, 0, QUERIES_A, KEYS_A, KEYS_B, WINDOW_H, WINDOW_W)
        if QUERIES_B > 0:
            bias_ba = bias_piece(table, QUERIES_A, QUERIES_B, 0, KEYS_A, WINDOW_H, WINDOW_W)
            if KEYS_B > 0:
                bias_bb = bias_piece(table, QUERIES_A, QUERIES_B, KEYS_A, KEYS_B, WINDOW_H, WINDOW_W)
        if QUERIES_C > 0:
            bias_ca = bias_piece(table, QUERIES_A + QUERIES_B, QUERIES_C, 0, KEYS_A, WINDOW_H, WINDOW_W)
            if KEYS_B > 0:
                bias_cb = bias_piece(table, QUERIES_A + QUERIES_B, QUERIES_C, KEYS_A, KEYS_B, WINDOW_H, WINDOW_W)

    for window in range(tl.program_id(0) // HEADS, windows, programs):
        place = window_place(window, rows, columns)
        keys_a = _load_keys(
            qkv, pad_key, pad_value, place, geometry, strides, 0, KEYS_A,
            D, D_TILE, CHANNELS, WINDOW_H, WINDOW_W, PAD_FIRST, PAD,
        )  # fmt: skip
        keys_b = None
        if KEYS_B > 0:
            keys_b = _load_keys(
                qkv, pad_key, pad_value, place, geometry, strides, KEYS_A, KEYS_B,
                D, D_TILE, CHANNELS, WINDOW_H, WINDOW_W, PAD_FIRST, PAD,
            )  # fmt: skip
        if KEEP_BIAS:
            _attend(
                qkv, out, table, bias_aa, bias_ab, keys_a, keys_b, place, geometry, strides, scale, 0, QUERIES_A,
                KEYS_A, KEYS_B, D, D_TILE, CHANNELS, WINDOW_H, WINDOW_W, PAD_FIRST, SHIFTED, PRECISION,
            )  # fmt: skip
            if QUERIES_B > 0:
                _attend(
                    qkv, out, table, bias_ba, bias_bb, keys_a, keys_b, place, geometry, strides, scale, QUERIES_A,
                    QUERIES_B, KEYS_A, KEYS_B, D, D_TILE, CHANNELS, WINDOW_H, WINDOW_W, PAD_FIRST, SHIFTED, PRECISION,
                )  # fmt: skip
            if QUERIES_C > 0:
                _attend(
                    qkv, out, table, bias_ca, bias_cb, keys_a, keys_b, place, geometry, strides, scale,
                    QUERIES_A + QUERIES_B, QUERIES_C, KEYS_A, KEYS_B, D, D_TILE, CHANNELS, WINDOW_H, WINDOW_W,
                    PAD_FIRST, SHIFTED, PRECISION,
                )  # fmt: skip
        else:
            for first in range(0, TOKENS, QUERIES_A):
                _attend(
                    qkv, out, table, None, None, keys_a, keys_b, place, geometry, strides, scale, first, QUERIES_A,
                    KEYS_A, KEYS_B, D, D_TILE, CHANNELS, WINDOW_H, WINDOW_W, PAD_FIRST, SHIFTED, PRECISION,
                )  # fmt: skip


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
    """The forward pass; arguments as those of `magnet_fast.ops.window_attention`, checked already.

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
        programs = call.programs_per_head(config)
        _forward_kernel[grid(programs * num_heads)](
            qkv, call.table, call.pad, out, *qkv.stride()[:3], *call.geometry, call.windows, programs,
            scale * LOG2E.value, **call.constants, **_launch_options(config),
        )  # fmt: skip

    with on_device(qkv):
        _forward_autotuner(launch, qkv.device, window_h * window_w, call.d, qkv.dtype)
    return out


class _Call:
    """What forward and backward have in common: a call's tensors as the kernels read them, sizes and constants."""

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
        self.channels, self.d = channels // 3, channels // 3 // num_heads
        self.windows = batch * rows * columns
        self.padded = (height, width) != (rows * window_h, columns * window_w)
        self.geometry = (height, width, rows, columns, shift_h, shift_w, shift_h % rolled_h, shift_w % rolled_w)
        self.table = bias_table.t().contiguous()
        self.pad = None if pad_qkv is None else pad_qkv.to(qkv.dtype).contiguous()
        self.constants = {
            "HEADS": num_heads,
            "D": self.d,
            "D_TILE": power_of_two(self.d),
            "WINDOW_H": window_h,
            "WINDOW_W": window_w,
            "PAD_FIRST": pad_first,
            "PAD": self.padded and pad_qkv is not None,
            "SHIFTED": bool(shift_h or shift_w),
            "PRECISION": input_precision(qkv.dtype),
        }

    def programs_per_head(self, config: triton.Config) -> int:
        """Enough to fill the device, and so that all but the last of them walk over equally many windows."""
        wanted = multiprocessors(self.device) * config.kwargs["RESIDENT"]
        wanted = max(1, wanted // self.constants["HEADS"])
        return -(-self.windows // -(-self.windows // wanted))


def _launch_options(config: triton.Config) -> dict[str, object]:
    """What of a configuration goes to the kernel: all but the number of programs beside each other."""
    options = config.all_kwargs()
    del options["RESIDENT"]
    return options


def _pieces(tokens: int, largest: int, count: int) -> list[int]:
    """``tokens`` as a sum of ``count`` powers of two (or 0) of at least 16, the larger first, with few idle lanes."""
    if tokens <= 0:
        return [0] * count
    covering = power_of_two(tokens)
    if count == 1 or covering <= largest and covering - tokens < 16:
        return [covering] + [0] * (count - 1)
    first = min(largest, max(16, covering // 2))
    rest = _pieces(tokens - first, largest, count - 1)
    if first + sum(rest) >= covering and covering <= largest:
        return [covering] + [0] * (count - 1)
    return [first, *rest]


def _forward_candidates(tokens: int, d: int, dtype: torch.dtype) -> Sequence[triton.Config]:
    """Configurations by window and head width: tiles, warps, stages, and programs for each multiprocessor."""
    keys_a, keys_b = _pieces(tokens, 128, 2)
    keep = tokens <= 144
    queries = _pieces(tokens, 64, 3) if keep else [64, 0, 0]
    tiles = dict(zip(("QUERIES_A", "QUERIES_B", "QUERIES_C"), queries, strict=True))
    tiles |= {"KEYS_A": keys_a, "KEYS_B": keys_b, "KEEP_BIAS": keep}
    return [
        triton.Config({**tiles, "RESIDENT": resident}, num_warps=warps, num_stages=stages)
        for warps in (4, 8)
        for stages in (1, 2)
        for resident in (2,)
    ]


_forward_autotuner = Autotuner(_forward_candidates, _forward_kernel)
