"""The gradient of deformable attention's `value`: a scatter, turned into a gather in a fixed order.

Every point adds to the four pixels around it. Float atomics would add in the order in which programs happen to run, and
differ in the last bits from run to run. Instead the points are put into bins, one for each square of four pixels, and
every pixel adds up the points of its four bins, in the order of the queries. What is counted and numbered along the way
is whole numbers, to which atomics are exact:

1. `_count_kernel` counts the points of each bin and numbers them as they come (any order);
2. the counts become the bins' places in one list (a cumulative sum);
3. `_list_kernel` writes each point's number into its bin's part of the list;
4. `_sort_kernel` finds each point's rank in its bin by comparing numbers, and writes its query and shares there;
5. `_gather_kernel` adds up, for each pixel, the gradients that its points' queries got.

Step 4 takes as many comparisons a point as the bin has points. So that a small map under many queries does not make
that long, its bins are split by query (`_POINTS_OF_BIN`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from magnet_fast.kernels import _runtime
from magnet_fast.kernels._deformable_launch import Points
from magnet_fast.kernels._deformable_points import corners_of, maps_of, places_of, weights_of
from magnet_fast.kernels._runtime import rounded
from torch import Tensor


@triton.jit
def _bins_of(groups, maps, query, queries, column, line, touches, LEVELS: tl.constexpr, POINTS: tl.constexpr):
    """The bin of each point, (BLOCK_Q, BLOCK_P), -1 if it touches no pixel. A bin is a square, whose upper left pixel
    is (column, line), both from -1, and one of the map's groups of queries."""
    level = tl.arange(0, column.shape[1]) // POINTS
    found = tl.full(column.shape, -1, tl.int32)
    first = 0
    for index in tl.static_range(LEVELS):
        lines, columns = maps[2 * index] + 1, maps[2 * index + 1] + 1
        group = (query * groups[index] // queries).to(tl.int32)
        square = (line + 1) * columns + column + 1
        found = tl.where((level == index)[None, :] & touches, first + square * groups[index] + group[:, None], found)
        first += lines * columns * groups[index]
    return found


@triton.jit
def _count_kernel(
    places_ptr,  # (B, Q, h, L, K, 2): sampling_locations, or sampling_offsets if FUSED; (L, K, 2) contiguous
    weights_ptr,  # not read
    reference_ptr,  # (B, Q, L, 2 or 4) if FUSED, the last dimension contiguous; strides may be 0
    counts_ptr,  # (B, h, bins) int32, contiguous, zero; out: points of each bin
    bins_ptr,  # (B, h, Q, L * K) int32, contiguous, out: the point's bin
    numbers_ptr,  # (B, h, Q, L * K) int32, contiguous, out: the point's number in its bin
    places_batch,
    places_stride,
    places_head,
    weights_batch,
    weights_stride,
    weights_head,
    reference_batch,
    reference_query,
    reference_level,
    queries,
    heads,
    blocks,
    bins,
    maps,  # (H, W) of every level, one after the other
    groups,  # of queries, for every level
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    TOTAL: tl.constexpr = LEVELS * POINTS
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    query = index // heads % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image = index // heads // blocks
    is_query = query < queries
    lines, columns, _ = maps_of(maps, LEVELS, POINTS, BLOCK_P)
    x, y, _, _, _, _ = places_of(
        places_ptr + image * places_batch + head * places_head,
        reference_ptr + image * reference_batch,
        places_stride,
        reference_query,
        reference_level,
        query,
        is_query,
        lines,
        columns,
        TOTAL,
        POINTS,
        FUSED,
        BOXES,
        BLOCK_P,
    )
    column, line, _, _, touches = corners_of(x, y, lines, columns)
    touches = touches & is_query[:, None]
    slot = image * heads + head
    found = _bins_of(groups, maps, query, queries, column, line, touches, LEVELS, POINTS)
    number = tl.atomic_add(counts_ptr + slot * bins + found, 1, mask=touches, sem="relaxed")
    point = tl.arange(0, BLOCK_P)
    exists = is_query[:, None] & (point < TOTAL)[None, :]
    at = slot * queries * TOTAL + query[:, None] * TOTAL + point[None, :]
    tl.store(bins_ptr + at, found, mask=exists)
    tl.store(numbers_ptr + at, number, mask=exists)


@triton.jit
def _list_kernel(
    bins_ptr,  # (B, h, points) int32, contiguous
    numbers_ptr,  # (B, h, points) int32, contiguous
    ends_ptr,  # (B, h, bins) int32, contiguous: where each bin ends in the list
    counts_ptr,  # (B, h, bins) int32, contiguous
    list_ptr,  # (B, h, points) int32, contiguous, out: the points by bin
    points,  # of one head and image
    bins,
    blocks,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    slot = index // blocks
    point = (index % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    exists = point < points
    found = tl.load(bins_ptr + slot * points + point, mask=exists, other=-1)
    number = tl.load(numbers_ptr + slot * points + point, mask=exists, other=0)
    listed = found >= 0
    end = tl.load(ends_ptr + slot * bins + found, mask=listed, other=0)
    count = tl.load(counts_ptr + slot * bins + found, mask=listed, other=0)
    tl.store(list_ptr + slot * points + end - count + number, point, mask=listed)


@triton.jit
def _sort_kernel(
    places_ptr,  # (B, Q, h, L, K, 2): sampling_locations, or sampling_offsets if FUSED; (L, K, 2) contiguous
    weights_ptr,  # (B, Q, h, L, K): attention_weights, or attention_logits if FUSED; (L, K) contiguous
    reference_ptr,  # (B, Q, L, 2 or 4) if FUSED, the last dimension contiguous; strides may be 0
    bins_ptr,  # (B, h, Q, L * K) int32, contiguous
    ends_ptr,  # (B, h, bins) int32, contiguous
    counts_ptr,  # (B, h, bins) int32, contiguous
    list_ptr,  # (B, h, Q * L * K) int32, contiguous: the points by bin, those of a bin in any order
    sorted_query_ptr,  # (B, h, Q * L * K) int32, contiguous, out: by bin and then by point, the point's query
    sorted_shares_ptr,  # (B, h, Q * L * K, 4) float32, contiguous, out: its weight times each corner's share
    places_batch,
    places_stride,
    places_head,
    weights_batch,
    weights_stride,
    weights_head,
    reference_batch,
    reference_query,
    reference_level,
    queries,
    heads,
    blocks,
    bins,
    maps,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    TOTAL: tl.constexpr = LEVELS * POINTS
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    query = index // heads % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image = index // heads // blocks
    is_query = query < queries
    slot = image * heads + head
    lines, columns, _ = maps_of(maps, LEVELS, POINTS, BLOCK_P)
    weights = weights_of(
        weights_ptr + image * weights_batch + head * weights_head,
        weights_stride,
        query,
        is_query,
        TOTAL,
        FUSED,
        BLOCK_P,
    )
    x, y, _, _, _, _ = places_of(
        places_ptr + image * places_batch + head * places_head,
        reference_ptr + image * reference_batch,
        places_stride,
        reference_query,
        reference_level,
        query,
        is_query,
        lines,
        columns,
        TOTAL,
        POINTS,
        FUSED,
        BOXES,
        BLOCK_P,
    )
    _, _, right, low, _ = corners_of(x, y, lines, columns)
    point = tl.arange(0, BLOCK_P)
    exists = is_query[:, None] & (point < TOTAL)[None, :]
    this = (query[:, None] * TOTAL + point[None, :]).to(tl.int32)
    found = tl.load(bins_ptr + slot * queries * TOTAL + this, mask=exists, other=-1)
    listed = found >= 0
    count = tl.load(counts_ptr + slot * bins + found, mask=listed, other=0)
    first = slot * queries * TOTAL + tl.load(ends_ptr + slot * bins + found, mask=listed, other=0) - count
    rank = tl.zeros([BLOCK_Q, BLOCK_P], tl.int32)
    for other in range(0, tl.max(tl.max(count, 1), 0)):
        # The largest int32 is no point's number.
        rank += (tl.load(list_ptr + first + other, mask=other < count, other=0x7FFFFFFF) < this).to(tl.int32)
    tl.store(sorted_query_ptr + first + rank, tl.broadcast_to(query[:, None], this.shape).to(tl.int32), mask=listed)
    shares = sorted_shares_ptr + 4 * (first + rank)
    tl.store(shares, (1.0 - right) * (1.0 - low) * weights, mask=listed)
    tl.store(shares + 1, right * (1.0 - low) * weights, mask=listed)
    tl.store(shares + 2, (1.0 - right) * low * weights, mask=listed)
    tl.store(shares + 3, right * low * weights, mask=listed)


@triton.jit
def _gather_kernel(
    grad_out_ptr,  # (B, Q, h * d), contiguous
    ends_ptr,  # (B, h, bins) int32, contiguous
    counts_ptr,  # (B, h, bins) int32, contiguous
    sorted_query_ptr,  # (B, h, Q * L * K) int32, contiguous
    sorted_shares_ptr,  # (B, h, Q * L * K, 4) float32, contiguous
    grad_value_ptr,  # (B, S, h, d), contiguous, out
    queries,
    heads,
    positions,  # S
    points,  # Q * L * K
    bins,
    blocks,  # of BLOCK_S positions
    width,
    maps,
    groups,
    LEVELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,  # points of a bin that are read at a time
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = index % heads
    # The last maps are the smallest and have the most points a pixel: they start first.
    block = blocks - 1 - index // heads % blocks
    image = index // heads // blocks
    slot = image * heads + head
    position = (block * BLOCK_S).to(tl.int32) + tl.arange(0, BLOCK_S)
    columns = tl.full([BLOCK_S], 1, tl.int32)
    group = tl.zeros([BLOCK_S], tl.int32)
    first_position = tl.zeros([BLOCK_S], tl.int32)
    first_bin = tl.zeros([BLOCK_S], tl.int32)
    start, bin_start = 0, 0
    for level in tl.static_range(LEVELS):
        # The last map whose start is not beyond the position is the position's.
        here = (position >= start) & (position < positions)
        columns = tl.where(here, maps[2 * level + 1], columns)
        group = tl.where(here, groups[level], group)
        first_position = tl.where(here, start, first_position)
        first_bin = tl.where(here, bin_start, first_bin)
        start += maps[2 * level] * maps[2 * level + 1]
        bin_start += (maps[2 * level] + 1) * (maps[2 * level + 1] + 1) * groups[level]
    line, column = (position - first_position) // columns, (position - first_position) % columns
    grad_out_ptr += (image * queries * heads + head) * width
    sorted_query_ptr += slot * points
    sorted_shares_ptr += slot * points * 4

    for start_channel in range(0, width, BLOCK_D):
        channel = start_channel + tl.arange(0, BLOCK_D)
        sums = tl.zeros([BLOCK_S, BLOCK_N, BLOCK_D], tl.float32)
        for corner in tl.static_range(4):
            # The square whose corner 0 1 / 2 3 this pixel is. All groups of a square are neighbours.
            square = (line + 1 - corner // 2) * (columns + 1) + column + 1 - corner % 2
            one = slot * bins + first_bin + square * group
            on_map = position < positions
            begin = tl.load(ends_ptr + one, mask=on_map, other=0) - tl.load(counts_ptr + one, mask=on_map, other=0)
            count = tl.load(ends_ptr + one + group - 1, mask=on_map, other=0) - begin
            for other in range(0, tl.max(count, 0), BLOCK_N):
                number = other + tl.arange(0, BLOCK_N)
                exists = number[None, :] < count[:, None]
                at = begin[:, None] + number[None, :]
                query = tl.load(sorted_query_ptr + at, mask=exists, other=0)
                share = tl.load(sorted_shares_ptr + 4 * at.to(tl.int64) + corner, mask=exists, other=0.0)
                offsets = query.to(tl.int64)[:, :, None] * (heads * width) + channel[None, None, :]
                mask = exists[:, :, None] & (channel < width)[None, None, :]
                sums += share[:, :, None] * tl.load(grad_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        at = ((image * positions + position) * heads + head) * width
        mask = (position < positions)[:, None] & (channel < width)[None, :]
        gradient = rounded(tl.sum(sums, 1), grad_value_ptr.dtype.element_ty)
        tl.store(grad_value_ptr + at[:, None] + channel[None, :], gradient, mask=mask)


# Points that one bin should have, if they are spread evenly.
_POINTS_OF_BIN = 32


def gradient_of_value(grad_out: Tensor, points: Points) -> Tensor:
    """(B, S, h, d), dtype of value, contiguous.

    Args:
        grad_out: (B, Q, h * d), contiguous.
    """
    value, device, (batch, queries, heads) = points.value, grad_out.device, points.counts
    positions, slots, total = value.shape[1], batch * heads, points.total
    shapes = list(zip(points.sizes[::2], points.sizes[1::2], strict=True))
    squares = [(height + 1) * (width + 1) for height, width in shapes]
    groups = tuple(triton.cdiv(queries * points.places.shape[4], count * _POINTS_OF_BIN) for count in squares)
    bins = sum(count * group for count, group in zip(squares, groups, strict=True))

    counts = torch.zeros(slots, bins, dtype=torch.int32, device=device)
    bin_of = torch.empty(slots, queries * total, dtype=torch.int32, device=device)
    # Numbers, and then queries by rank.
    numbers = torch.empty_like(bin_of)
    block_q = max(1, _POINTS_OF_PROGRAM // points.block_p)
    blocks = triton.cdiv(queries, block_q)
    grid = _runtime.grid(slots * blocks)
    cut = {"blocks": blocks, "bins": bins, "BLOCK_Q": block_q}
    _count_kernel[grid](
        **points.point_arguments(), counts_ptr=counts, bins_ptr=bin_of, numbers_ptr=numbers, groups=groups, **cut
    )
    ends = counts.cumsum(1, dtype=torch.int32)
    listed = torch.empty_like(bin_of)
    blocks = triton.cdiv(queries * total, _POINTS_OF_PROGRAM)
    _list_kernel[_runtime.grid(slots * blocks)](
        bins_ptr=bin_of,
        numbers_ptr=numbers,
        ends_ptr=ends,
        counts_ptr=counts,
        list_ptr=listed,
        points=queries * total,
        bins=bins,
        blocks=blocks,
        BLOCK=_POINTS_OF_PROGRAM,
    )
    shares = torch.empty(slots, queries * total, 4, dtype=torch.float32, device=device)
    _sort_kernel[grid](
        **points.point_arguments(),
        bins_ptr=bin_of,
        ends_ptr=ends,
        counts_ptr=counts,
        list_ptr=listed,
        sorted_query_ptr=numbers,
        sorted_shares_ptr=shares,
        **cut,
    )
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)

    def launch(config: triton.Config) -> None:
        blocks = triton.cdiv(positions, config.kwargs["BLOCK_S"])
        _gather_kernel[_runtime.grid(slots * blocks)](
            grad_out_ptr=grad_out,
            ends_ptr=ends,
            counts_ptr=counts,
            sorted_query_ptr=numbers,
            sorted_shares_ptr=shares,
            grad_value_ptr=grad_value,
            queries=queries,
            heads=heads,
            positions=positions,
            points=queries * total,
            bins=bins,
            blocks=blocks,
            width=points.width,
            maps=tuple(points.sizes),
            groups=groups,
            LEVELS=len(groups),
            BLOCK_D=points.block_d,
            **config.all_kwargs(),
        )

    _GATHER(launch, device, points.block_d, points.width, heads, value.dtype)
    return grad_value


# Of the kernels that number points. They add to counts, so they are not tried out: one size for all.
_POINTS_OF_PROGRAM = 512


def _gathers(block_d: int, *_: object) -> list[triton.Config]:
    """Tiles of (pixels, points of a bin, channels)."""
    return [
        triton.Config({"BLOCK_S": max(1, block_s * 32 // block_d), "BLOCK_N": block_n}, num_warps=4, num_stages=1)
        for block_s, block_n in ((8, 8), (4, 8))
    ]


_GATHER = _runtime.Autotuner(_gathers, _gather_kernel)
