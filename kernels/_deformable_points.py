"""What the kernels of deformable attention share: where a query's points lie, and with what weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maps_of(maps, LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of each of a query's points: height and width of its map and the map's first position; 0 beyond the points.

    Points of all levels stand side by side, (BLOCK_P,), so that one softmax and one gather take them all.
    """
    level = tl.arange(0, BLOCK_P) // POINTS
    height = tl.zeros([BLOCK_P], tl.int32)
    width = tl.zeros([BLOCK_P], tl.int32)
    first = tl.zeros([BLOCK_P], tl.int32)
    start = 0
    for index in tl.static_range(LEVELS):
        here = level == index
        height = tl.where(here, maps[2 * index], height)
        width = tl.where(here, maps[2 * index + 1], width)
        first = tl.where(here, start, first)
        start += maps[2 * index] * maps[2 * index + 1]
    return height, width, first


@triton.jit
def weights_of(
    weights_ptr,  # of one head and image, (Q, L, K): weights, or logits if FUSED
    weights_stride,
    query,  # (BLOCK_Q,) int64
    is_query,
    TOTAL: tl.constexpr,  # L * K
    FUSED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The points' weights, (BLOCK_Q, BLOCK_P) float32; 0 beyond them."""
    point = tl.arange(0, BLOCK_P)
    exists = is_query[:, None] & (point < TOTAL)[None, :]
    offsets = query[:, None] * weights_stride + point[None, :]
    weights = tl.load(weights_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    if FUSED:
        weights = tl.where((point < TOTAL)[None, :], weights, float("-inf"))
        weights = tl.exp(weights - tl.max(weights, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]
    return weights


@triton.jit
def places_of(
    places_ptr,  # of one head and image, (Q, L, K, 2): locations, or offsets if FUSED
    reference_ptr,  # of one image, (Q, L, 2 or 4), with FUSED
    places_stride,
    reference_query,
    reference_level,
    query,  # (BLOCK_Q,) int64
    is_query,
    height,  # (BLOCK_P,), of `maps_of`
    width,
    TOTAL: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(x, y, unit_x, unit_y, offset_x, offset_y), each (BLOCK_Q, BLOCK_P) float32: the points in pixels of their map,
    with the first pixel's centre at 0; what one unit of the given coordinate moves them by; and, with FUSED, the
    offsets. Beyond the points the map's sides are 0, and nothing lies on it.

    Several kernels place the same points and must find the same pixels, to the last bit: the sums are spelled as fused
    ones, so that the compiler does not fuse them in one kernel and not in another."""
    point = tl.arange(0, BLOCK_P)
    exists = is_query[:, None] & (point < TOTAL)[None, :]
    offsets = query[:, None] * places_stride + 2 * point[None, :]
    place_x = tl.load(places_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    place_y = tl.load(places_ptr + offsets + 1, mask=exists, other=0.0).to(tl.float32)
    columns = tl.broadcast_to(width.to(tl.float32)[None, :], place_x.shape)
    lines = tl.broadcast_to(height.to(tl.float32)[None, :], place_x.shape)
    if FUSED:
        at = query[:, None] * reference_query + (point // POINTS)[None, :] * reference_level
        centre_x = tl.load(reference_ptr + at, mask=exists, other=0.0).to(tl.float32)
        centre_y = tl.load(reference_ptr + at + 1, mask=exists, other=0.0).to(tl.float32)
        if BOXES:
            side_x = tl.load(reference_ptr + at + 2, mask=exists, other=0.0).to(tl.float32)
            side_y = tl.load(reference_ptr + at + 3, mask=exists, other=0.0).to(tl.float32)
            unit_x, unit_y = side_x * (0.5 / POINTS) * columns, side_y * (0.5 / POINTS) * lines
        else:
            unit_x, unit_y = tl.full(place_x.shape, 1.0, tl.float32), tl.full(place_x.shape, 1.0, tl.float32)
        x, y = tl.fma(centre_x, columns, -0.5), tl.fma(centre_y, lines, -0.5)
        x, y = tl.fma(place_x, unit_x, x), tl.fma(place_y, unit_y, y)
    else:
        unit_x, unit_y = columns, lines
        x, y = tl.fma(place_x, columns, -0.5), tl.fma(place_y, lines, -0.5)
    return x, y, unit_x, unit_y, place_x, place_y


@triton.jit
def corners_of(x, y, height, width):
    """(column, line, right, low, touches): the pixel up and left of each point, which may be -1, the shares of the
    pixels right of it and below it, and whether the point touches its map. NaN does not."""
    touches = (x > -1.0) & (y > -1.0) & (x < width.to(tl.float32)) & (y < height.to(tl.float32)) & (width > 0)
    # What is far outside would not be an int.
    x, y = tl.where(touches, x, 0.0), tl.where(touches, y, 0.0)
    left, upper = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), upper.to(tl.int32), x - left, y - upper, touches
