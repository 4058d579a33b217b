"""The products of relative attention's queries with its tables, and what their gradients give.

Along one axis the queries of one line of a window, a row or a column, need the same S rows of the table, whichever
window, head and image they are of. So a program takes one line, and queries of it from everywhere: plain products of
matrices, with nothing computed that no key asks for.

Of the axis of rows the products lie as (B, HEADS, S, tokens), which the attention reads a row of keys at a time; of the
axis of columns as (B, HEADS, tokens, S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from magnet_fast.kernels._runtime import dot, grid, multiprocessors, power_of_two, precision, rounded
from magnet_fast.kernels._window_index import LOG2E
from torch import Tensor

# Changing values of these are not worth another compilation.
COUNTS = ["along", "across", "lines", "windows", "items", "blocks"]

_TILE = 32
_LEAST_CHANNELS = 32


@triton.jit
def line_items(line, FIRST, sizes, HEADS: tl.constexpr, ITEMS: tl.constexpr):
    """Of ITEMS queries of a line from FIRST on: image, head, place along the line, place across, token of the map, and
    whether they exist."""
    along, across, lines, windows, items, map_along, map_across = sizes
    item = FIRST + tl.arange(0, ITEMS)
    place = item % along
    head = item // along % HEADS
    window = item // along // HEADS % windows
    image = (item // along // HEADS // windows).to(tl.int64)
    other = window * lines + line
    token = place * map_along + other * map_across
    return image, head, place, other, token, (item < items) & (other < across)


@triton.jit
def load_items(qkv, place, strides, D: tl.constexpr, D_TILE: tl.constexpr):
    """(items, D_TILE): their queries; 0 for those that do not exist, and beyond D."""
    image, head, along, across, _, exists = place
    offsets = image * strides[0] + along * strides[1] + across * strides[2] + head * D
    channel = tl.arange(0, D_TILE)
    mask = exists[:, None] & (channel < D)[None, :]
    return tl.load(qkv + offsets[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_line(table, line, first, lines, KEYS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr):
    """(KEYS, D_TILE): the table's rows for a line's queries and the keys from `first` on."""
    key = first + tl.arange(0, KEYS)
    channel = tl.arange(0, D_TILE)
    mask = (key < lines)[:, None] & (channel < D)[None, :]
    return tl.load(table + ((line - key + lines - 1) * D)[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def product_pointers(products, place, sizes, first, out_token, out_key, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """Where the products (items, KEYS) of a line lie, and which there are."""
    image, head, _, _, token, exists = place
    along, across, lines = sizes[0], sizes[1], sizes[2]
    key = first + tl.arange(0, KEYS)
    size = along.to(tl.int64) * across * lines
    pointers = products + ((image * HEADS + head) * size + token * out_token)[:, None] + (key * out_key)[None, :]
    return pointers, exists[:, None] & (key < lines)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def positions_kernel(
    qkv,  # (B, H, W, 3 * HEADS * D), any strides but the last
    table,  # (2 * lines - 1, D) contiguous
    products,  # float32, times log2(e)
    stride_image,
    stride_along,
    stride_across,
    along,  # tokens of the map in a line
    across,  # lines of the map
    lines,  # of a window: keys of each query
    windows,  # side by side across the lines
    items,  # B * windows * HEADS * along: queries of one line of all windows
    blocks,  # that they are cut into
    map_along,  # tokens of the map between neighbours along the line, and across
    map_across,
    out_token,  # numbers between the products of neighbouring tokens, and keys
    out_key,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    ITEMS_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, line = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    sizes = (along, across, lines, windows, items, map_along, map_across)
    place = line_items(line, block * ITEMS_TILE, sizes, HEADS, ITEMS_TILE)
    query = load_items(qkv, place, (stride_image, stride_along, stride_across), D, D_TILE)
    for first in range(0, lines, KEYS):
        found = load_line(table, line, first, lines, KEYS, D, D_TILE)
        if found.dtype == query.dtype:
            product = dot(query, tl.trans(found), None, PRECISION)
        else:
            product = dot(query.to(tl.float32), tl.trans(found.to(tl.float32)), None, PRECISION)
        pointers, mask = product_pointers(products, place, sizes, first, out_token, out_key, HEADS, KEYS)
        tl.store(pointers, product * LOG2E, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def positions_queries_kernel(
    grads,  # float32, of the products, which lie alike
    table,
    before,  # (B, H, W, HEADS * D) float32 contiguous: dQ without this axis
    to,  # (B, H, W, TO_CHANNELS) contiguous: dQ in the first channels; may be before
    along,
    across,
    lines,
    windows,
    items,
    blocks,
    map_along,
    map_across,
    out_token,
    out_key,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    TO_CHANNELS: tl.constexpr,
    ITEMS_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, line = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    sizes = (along, across, lines, windows, items, map_along, map_across)
    place = line_items(line, block * ITEMS_TILE, sizes, HEADS, ITEMS_TILE)
    image, head, _, _, token, exists = place
    channel = tl.arange(0, D_TILE)
    mask = exists[:, None] & (channel < D)[None, :]
    number = image * along * across + token
    total = tl.load(before + (number * (HEADS * D) + head * D)[:, None] + channel[None, :], mask=mask, other=0.0)
    for first in range(0, lines, KEYS):
        pointers, there = product_pointers(grads, place, sizes, first, out_token, out_key, HEADS, KEYS)
        grad = tl.load(pointers, mask=there, other=0.0)
        found = load_line(table, line, first, lines, KEYS, D, D_TILE)
        total = dot(grad, found.to(tl.float32), total, PRECISION)
    pointers = to + (number * TO_CHANNELS + head * D)[:, None] + channel[None, :]
    tl.store(pointers, rounded(total, to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*COUNTS, "programs"])
def positions_tables_kernel(
    grads,  # float32, of the products, which lie alike
    qkv,
    parts,  # (programs, lines, lines, D) float32: of each line's queries, the gradient of each key's row of the table
    stride_image,
    stride_along,
    stride_across,
    along,
    across,
    lines,
    windows,
    items,
    blocks,
    map_along,
    map_across,
    out_token,
    out_key,
    programs,  # that share a line's queries
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    ITEMS_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, line = tl.program_id(0) % programs, tl.program_id(0) // programs % lines
    first = tl.program_id(0) // programs // lines * KEYS
    sizes = (along, across, lines, windows, items, map_along, map_across)
    strides = (stride_image, stride_along, stride_across)
    total = tl.zeros((KEYS, D_TILE), tl.float32)
    for block in range(program, blocks, programs):
        place = line_items(line, block * ITEMS_TILE, sizes, HEADS, ITEMS_TILE)
        query = load_items(qkv, place, strides, D, D_TILE)
        pointers, there = product_pointers(grads, place, sizes, first, out_token, out_key, HEADS, KEYS)
        grad = tl.load(pointers, mask=there, other=0.0)
        total = dot(tl.trans(grad), query.to(tl.float32), total, PRECISION)
    key = first + tl.arange(0, KEYS)
    channel = tl.arange(0, D_TILE)
    row = (program.to(tl.int64) * lines + line) * lines + key
    mask = (key < lines)[:, None] & (channel < D)[None, :]
    tl.store(parts + (row * D)[:, None] + channel[None, :], total, mask=mask)


class Axis(NamedTuple):
    """One axis of a call: its table, and how its lines lie in the map."""

    table: Tensor
    """(2 * lines - 1, d) contiguous."""
    precision: str
    """Of the products that gradients have a part in."""
    shape: tuple[int, ...]
    """Of the products and of their gradients."""
    strides: tuple[int, int, int]
    """Of qkv: image, along a line, across."""
    sizes: dict[str, int]
    """The other arguments of the kernels."""
    constants: dict[str, int]

    @classmethod
    def of(cls, qkv: Tensor, table: Tensor, num_heads: int, window: int, axis: int) -> Axis:
        """`axis` 0: rows; 1: columns. `window`: the window's side along it."""
        batch, height, width, channels = qkv.shape
        tokens, d = height * width, channels // 3 // num_heads
        stride_image, stride_y, stride_x = qkv.stride()[:3]
        if axis == 0:
            along, across, shape = width, height, (batch, num_heads, window, tokens)
            strides = (stride_image, stride_x, stride_y)
            steps = {"map_along": 1, "map_across": width, "out_token": 1, "out_key": tokens}
        else:
            along, across, shape = height, width, (batch, num_heads, tokens, window)
            strides = (stride_image, stride_y, stride_x)
            steps = {"map_along": width, "map_across": 1, "out_token": window, "out_key": 1}
        windows = triton.cdiv(across, window)
        items = batch * windows * num_heads * along
        d_tile = power_of_two(d, _LEAST_CHANNELS)
        tile = min(_TILE, power_of_two(window))
        sizes = {
            "along": along,
            "across": across,
            "lines": window,
            "windows": windows,
            "items": items,
            "blocks": triton.cdiv(items, _TILE),
            **steps,
        }
        constants = {"HEADS": num_heads, "D": d, "D_TILE": d_tile, "ITEMS_TILE": _TILE, "KEYS": tile}
        # Gradients of products are in float32. Beside 16 bits TF32 holds more than these do, and all that they hold.
        backward = precision(qkv.dtype) if qkv.dtype == torch.float32 else "tf32"
        return cls(table.contiguous(), backward, shape, strides, sizes, constants)

    @property
    def lines(self) -> int:
        return self.sizes["lines"]

    def products(self, qkv: Tensor) -> Tensor:
        """Of every query with the rows of its table that its keys ask for, times log2(e), in float32."""
        found = torch.empty(self.shape, dtype=torch.float32, device=qkv.device)
        positions_kernel[grid(self.lines * self.sizes["blocks"])](
            qkv, self.table, found, *self.strides, **self.sizes, **self.constants,
            PRECISION=precision(self.table.dtype), num_warps=4,
        )  # fmt: skip
        return found

    def add_to_queries(self, grads: Tensor, before: Tensor, to: Tensor) -> None:
        """to = before + what the gradients of the products give to the queries.

        Args:
            grads: of the products, in their shape.
            before: (B, H, W, C) float32 contiguous.
            to: the same, or (B, H, W, 3 * C) of which the first C channels are written.
        """
        # As many warps as keep the registers within what the compiler grants: it spills some rather than grant more.
        warps = 8 if self.constants["D_TILE"] <= 64 else 4
        positions_queries_kernel[grid(self.lines * self.sizes["blocks"])](
            grads, self.table, before, to, **self.sizes, **self.constants, TO_CHANNELS=to.shape[3],
            PRECISION=self.precision, num_warps=warps,
        )  # fmt: skip

    def gradient_of_table(self, grads: Tensor, qkv: Tensor) -> Tensor:
        """(2 * lines - 1, d), in the table's dtype."""
        lines, d = self.lines, self.constants["D"]
        keys = triton.cdiv(lines, self.constants["KEYS"])
        # Enough to fill the device; what is left of a line's queries is added up one program after the other.
        programs = triton.cdiv(4 * multiprocessors(qkv.device), lines * keys)
        programs = min(programs, self.sizes["blocks"])
        parts = torch.empty((programs, lines, lines, d), dtype=torch.float32, device=qkv.device)
        positions_tables_kernel[grid(programs * lines * keys)](
            grads, qkv, parts, *self.strides, **self.sizes, **self.constants, programs=programs,
            PRECISION=self.precision, num_warps=4,
        )  # fmt: skip
        # Row (line - key + lines - 1) of the table: with the keys reversed, each line's rows lie one further on than
        # the line's before, so in rows that are one longer than the table they stand above each other.
        each = F.pad(parts.sum(0).flip(1), (0, 0, 0, lines)).flatten(0, 1)[: lines * (2 * lines - 1)]
        return each.unflatten(0, (lines, 2 * lines - 1)).sum(0).to(self.table.dtype)
