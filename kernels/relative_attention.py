"""SAM's attention with decomposed relative positions: keys stream by, and no logit or bias ever lies in memory.

A query's bias for the key at (y', x') is `by_row[y'] + by_column[x']`, S_h + S_w numbers: the products of the query
with the rows of both tables that its window asks for. `_relative_positions` computes them first, in float32, as
products of matrices: 2 % of the operations of SAM's whole maps. Made in here, they would have to be picked out of
registers.

A program takes a tile of a window's queries and streams over the keys in blocks of rows and columns, with a running
maximum and sum. It goes down a column of blocks before it takes the next one: the biases by columns are loaded once for
each column of blocks and stay in registers, those by rows are one number a query and row. Tiles of
one window and head run side by side, so that they read its keys from the L2.

The backward pass recomputes: `dV = P^T dO`, `dS = P * (dO V^T - rowsum(P * dO V^T))`, `dQ = scale * dS K`,
`dK = scale * dS^T Q`. The gradients of a query's S_h + S_w products are the sums of its dS over rows and over columns
of keys. They have the layout of the products, and give the tables' gradients and the positions' part of dQ, again as
products of matrices. Nothing is added to with atomics.

Source: Kirillov et al., "Segment Anything" (arXiv 2304.02643); Li et al., "MViTv2" (arXiv 2112.01526), section 4.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from magnet_fast.kernels._relative_backward import backward_keys_kernel, backward_queries_kernel, statistics_kernel
from magnet_fast.kernels._relative_index import (
    COUNTS,
    column_biases,
    load_block,
    query_places,
    row_biases,
    window_corner,
)
from magnet_fast.kernels._relative_positions import Axis
from magnet_fast.kernels._runtime import Autotuner, dot, grid, on_device, power_of_two, precision, rounded
from magnet_fast.kernels._window_index import LOG2E, load_tokens, store_tokens, token_offsets
from magnet_fast.kernels.window_attention import extent_of_image
from torch import Tensor

LARGEST_HEAD, LARGEST_HEAD_OF_FLOAT32 = 128, 64
"""Channels of a head that the kernels take: in 16 bits, and in float32, whose wider heads do not fit the registers."""

LARGEST_IMAGE = 2**31 - 1
"""Numbers that one image of a batch may span, and one head's products with a table: offsets within them have 32 bits,
those of images and heads 64."""


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    by_row,  # (B, HEADS, window_h, H * W) float32, times log2(e)
    by_column,  # (B, HEADS, H * W, window_w) float32, times log2(e)
    out,  # (B, H, W, CHANNELS) contiguous
    stride_image,
    stride_y,
    stride_x,
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
    PAD: tl.constexpr,  # there are padded tokens, and a pad to make them of
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
    by_row += (image * HEADS + head) * tokens * window_h
    by_column += (image * HEADS + head) * tokens * window_w

    y, x, real = query_places(corner, first_query, QUERIES)
    token = y * width + x
    query = load_tokens(qkv, token_offsets(y, x, strides), real, D, D_TILE)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, D_TILE), tl.float32)
    for first_x in range(0, window_w, KEY_COLUMNS):
        across = column_biases(by_column, token, window_w, first_x, KEY_ROWS, KEY_COLUMNS, False)
        for first_y in range(0, window_h, KEY_ROWS):
            key, value = load_block(
                qkv, pad, corner, sizes, strides, first_y, first_x, KEY_ROWS, KEY_COLUMNS, CHANNELS, D, D_TILE, PAD
            )
            bias = across + row_biases(by_row, token, tokens, window_h, first_y, KEY_ROWS, KEY_COLUMNS, False)
            logits = dot(query, tl.trans(key), None, PRECISION) * scale + bias
            before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
            # Where all was -infinity so far, -infinity - -infinity would be NaN.
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp2(logits - base[:, None])
            kept = tl.exp2(before - base)
            total = total * kept + tl.sum(weights, 1)
            result = dot(rounded(weights, query.dtype), value, result * kept[:, None], PRECISION)
    to = out + image * tokens * CHANNELS + head * D + token * CHANNELS
    store_tokens(to, real, result / total[:, None], D, D_TILE)


def relative_attention_forward(
    qkv: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    scale: float,
) -> Tensor:
    """The forward pass; arguments as `magnet_fast.ops.relative_attention`'s, checked already.

    Args:
        qkv: (B, H, W, 3 * C), float32, bfloat16 or float16; last dimension contiguous, other strides free.
        rel_height: (2 * window_h - 1, d), in qkv's dtype or float32.
        rel_width: (2 * window_w - 1, d), likewise.
        pad_qkv: (3 * C), or None for zeros.

    Returns:
        (B, H, W, C) contiguous, dtype of `qkv`.
    """
    call = _Call(qkv, rel_height, rel_width, pad_qkv, num_heads, window_h, window_w, scale)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))
    with on_device(qkv):
        products = call.products(qkv)

        def launch(config: triton.Config) -> None:
            blocks = triton.cdiv(window_h * window_w, config.kwargs["QUERIES"])
            _forward_kernel[grid(call.windows * num_heads * blocks)](
                qkv, call.pad, *products, out, *qkv.stride()[:3], *call.geometry, blocks, call.scale,
                **call.constants, **config.all_kwargs(),
            )  # fmt: skip

        _forward_autotuner(launch, qkv.device, *call.key)
    return out


def relative_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `qkv`, both tables and `pad_qkv` in their shapes and dtypes, None for those not wanted.

    Args:
        grad_out: (B, H, W, C), any strides.
        wanted: for each of the four, whether it is.
    """
    call = _Call(qkv, rel_height, rel_width, pad_qkv, num_heads, window_h, window_w, scale)
    if grad_out.stride(3) != 1 or extent_of_image(grad_out) > LARGEST_IMAGE:  # for one, the expanded gradient of a sum
        grad_out = grad_out.contiguous()
    want_qkv, *want_tables = wanted[:3]
    want_pad = wanted[3] and pad_qkv is not None and call.padded
    batch, height, width, channels = *qkv.shape[:3], call.channels

    def empty(want: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=qkv.device) if want else None

    grad_qkv = empty(want_qkv, *qkv.shape, dtype=qkv.dtype)
    grad_query = empty(want_qkv, batch, height, width, channels)
    grads = [empty(want_qkv or want, *axis.shape) for want, axis in zip(want_tables, call.axes, strict=True)]
    statistics = [empty(True, batch, num_heads, height * width) for _ in range(2)]

    with on_device(qkv):
        inputs = (qkv, call.pad, *call.products(qkv), grad_out, *statistics)
        sizes = (*qkv.stride()[:3], *grad_out.stride()[:3], *call.geometry)

        def launch_queries(kernel: object, outputs: Sequence[Tensor | None], config: triton.Config) -> None:
            blocks = triton.cdiv(window_h * window_w, config.kwargs["QUERIES"])
            kernel[grid(call.windows * num_heads * blocks)](
                *inputs, *outputs, *sizes, blocks, call.scale, **call.constants, **config.all_kwargs()
            )

        def launch_keys(config: triton.Config) -> Tensor | None:
            blocks = triton.cdiv(window_h, config.kwargs["KEY_ROWS"]) * triton.cdiv(
                window_w, config.kwargs["KEY_COLUMNS"]
            )
            parts = empty(want_pad, call.windows * blocks, 2, channels)
            backward_keys_kernel[grid(call.windows * num_heads * blocks)](
                *inputs, grad_qkv, parts, *sizes, blocks, call.scale, **call.constants, **config.all_kwargs()
            )
            return parts

        pad_parts = None
        _statistics_autotuner(functools.partial(launch_queries, statistics_kernel, ()), qkv.device, *call.key)
        if any(wanted[:3]):
            launch = functools.partial(launch_queries, backward_queries_kernel, (grad_query, *grads))
            _backward_queries_autotuner(launch, qkv.device, *call.key)
        if want_qkv or want_pad:
            pad_parts = _backward_keys_autotuner(launch_keys, qkv.device, *call.key)
        if want_qkv:
            call.axes[0].add_to_queries(grads[0], grad_query, grad_query)
            call.axes[1].add_to_queries(grads[1], grad_query, grad_qkv)
        grad_tables = [
            axis.gradient_of_table(grad, qkv) if want else None
            for want, axis, grad in zip(want_tables, call.axes, grads, strict=True)
        ]
    grad_pad = None
    if wanted[3] and pad_qkv is not None:
        grad_pad = torch.zeros(pad_qkv.shape, dtype=pad_qkv.dtype, device=qkv.device)
        if pad_parts is not None:
            grad_pad[channels:] = pad_parts.sum(0).flatten()
    return [grad_qkv, *grad_tables, grad_pad]


class _Call:
    """What the passes have in common: a call's tensors as the kernels read them, its sizes and constants."""

    def __init__(
        self,
        qkv: Tensor,
        rel_height: Tensor,
        rel_width: Tensor,
        pad_qkv: Tensor | None,
        num_heads: int,
        window_h: int,
        window_w: int,
        scale: float,
    ) -> None:
        batch, height, width, channels = qkv.shape
        rows, columns = -(-height // window_h), -(-width // window_w)
        self.channels, d = channels // 3, channels // 3 // num_heads
        self.windows = batch * rows * columns
        self.padded = (height, width) != (rows * window_h, columns * window_w)
        self.geometry = (height, width, rows, columns, window_h, window_w)
        self.scale = scale * LOG2E.value
        self.pad = None if pad_qkv is None else pad_qkv.to(qkv.dtype).contiguous()
        self.axes = (
            Axis.of(qkv, rel_height, num_heads, window_h, 0),
            Axis.of(qkv, rel_width, num_heads, window_w, 1),
        )
        self.constants = {
            "HEADS": num_heads,
            "D": d,
            "D_TILE": power_of_two(d, _LEAST_CHANNELS),
            "PAD": self.padded and pad_qkv is not None,
            "PRECISION": precision(qkv.dtype),
        }
        self.key = (_columns(window_w), self.constants["D_TILE"], qkv.dtype, self.constants["PRECISION"])

    def products(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(axis.products(qkv) for axis in self.axes)


_LEAST_CHANNELS = 32


def _columns(window_w: int) -> int:
    """Columns of a block of keys: those that leave the fewest lanes idle, and of these the most."""
    return min((64, 32, 16), key=lambda columns: triton.cdiv(window_w, columns) * columns)


def _config(columns: int, queries: int, keys: int, warps: int, stages: int = 1) -> triton.Config:
    """Blocks of `keys`, in no more than so many columns."""
    columns = min(columns, keys)
    sizes = {"QUERIES": queries, "KEY_ROWS": keys // columns, "KEY_COLUMNS": columns}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def _forward_candidates(columns: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    """Configurations by columns of a block of keys, head width and dtype, the best guess first.

    Only such as need no more registers than there are on any chip, which `magnet_fast.kernels.report` tells: a head of
    more than 64 channels, whose tiles have 128, leaves room for few keys at a time, and so does float32, whose operands
    take several times the registers. Where there is room, the next keys are fetched while these are used.
    """
    if dtype == torch.float32:
        return [_config(columns, 32, 32, 4)]
    if d > 64:
        return [_config(columns, 64, 16, 4, 2), _config(columns, 32, 32, 4, 2)]
    return [_config(columns, 64, 64, 4), _config(columns, 128, 32, 8, 2), _config(columns, 32, 32, 4, 2)]


def _statistics_candidates(columns: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    if dtype == torch.float32:
        return [_config(columns, 16, 32, 4)]
    if d > 64:
        return [_config(columns, 64, 16, 4, 2)]
    return [_config(columns, 64, 64, 4), _config(columns, 128, 32, 8, 2)]


def _backward_queries_candidates(columns: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    if dtype == torch.float32:
        return [_config(columns, 16, 32, 4)]
    if d > 64:
        return [_config(columns, 32, 16, 4, 2), _config(columns, 32, 32, 8)]
    return [_config(columns, 64, 16, 4, 2), _config(columns, 32, 32, 4, 2)]


def _backward_keys_candidates(columns: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    if dtype == torch.float32:
        return [_config(columns, 16, 32, 4)]
    if d > 64:
        return [_config(columns, 32, 64, 8, 2)]
    return [_config(columns, 32, 64, 4, 2), _config(columns, 32, 128, 8, 2)]


_forward_autotuner = Autotuner(_forward_candidates, _forward_kernel)
_statistics_autotuner = Autotuner(_statistics_candidates, statistics_kernel)
_backward_queries_autotuner = Autotuner(_backward_queries_candidates, backward_queries_kernel)
_backward_keys_autotuner = Autotuner(_backward_keys_candidates, backward_keys_kernel)


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that `report` compiles: SAM's maps and windows of three head widths, on meta tensors."""
    maps = [((64, 64), None), ((64, 64), 14), ((48, 96), None)]
    widths = [d for d in (64, 80) if d <= LARGEST_HEAD_OF_FLOAT32 or dtype != torch.float32]
    sizes = [(*each, d) for d in widths for each in maps]
    for (height, width), window, d in sizes[:1] if quick else sizes:
        heads, sides = 12, (height, width) if window is None else (window, window)
        qkv = torch.empty(1, height, width, 3 * heads * d, dtype=dtype, device="meta")
        tables = [torch.empty(2 * side - 1, d, dtype=dtype, device="meta") for side in sides]
        pad = torch.empty(3 * heads * d, dtype=dtype, device="meta")
        arguments = (qkv, *tables, pad, heads, *sides, d**-0.5)
        grad = torch.empty(1, height, width, heads * d, dtype=dtype, device="meta")
        label = f"{f'map {height}x{width}' if window is None else f'w {window}x{window}'}, d {d}"
        yield label, functools.partial(relative_attention_forward, *arguments)
        yield label, functools.partial(relative_attention_backward, grad, *arguments, (True, True, True, True))
