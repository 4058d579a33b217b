"""COCO's segmentations, polygons or RLE, checked before any of it reaches native code, and as masks.

pycocotools draws what it is given: coordinates that are not finite, or far outside, cost memory without bound, and runs
that do not fit the mask are written past its end. So everything here is checked first, with a reason in words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from magnet_fast.data.transforms.pictures import resize_nearest

MARGIN = 3  # image sides by which a coordinate may lie outside: annotators slip off an edge, not that far
_DIGITS = 7  # of 5 bits each, for one run: 35 bits, more than any image has pixels


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A segmentation of COCO's as a mask, uint8 (height, width) of 0 and 1.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels (their union), an RLE dict of `size` and
            `counts`, compressed (str or bytes) or not (list), or a list of RLEs (their union). Polygons of fewer
            than three points cover nothing and are passed by, as in COCO's own files.
        height, width: of the image, in pixels.

    Raises ValueError as `check_segmentation` does; ImportError where polygons meet no pycocotools.
    """
    polygons, runs = _parts(segmentation, height, width)
    mask = np.zeros((height, width), dtype=np.uint8)
    for counts in runs:
        mask |= _fill(counts, height, width)
    if polygons:
        mask |= _draw(polygons, height, width)
    return mask


def draw_segmentation(segmentation: Any, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """A segmentation as a mask of another size than its image's, uint8 (h, w): polygons scaled and drawn there, RLEs
    resized by nearest neighbour, as detectron2 transforms annotations.

    Args:
        segmentation, height, width: as for `decode_segmentation`.
        size: (h, w) in pixels.

    Raises what `decode_segmentation` raises.
    """
    polygons, runs = _parts(segmentation, height, width)
    mask = np.zeros(size, dtype=np.uint8)
    for counts in runs:
        mask |= resize_nearest(_fill(counts, height, width), size)
    if polygons:
        scale = np.array([size[1] / width, size[0] / height])
        mask |= _draw([(one.reshape(-1, 2) * scale).reshape(-1) for one in polygons], *size)
    return mask


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Raise ValueError, saying what came and what was expected, unless `decode_segmentation` can read it.

    Coordinates must be finite numbers at most `MARGIN` image sides outside the image; an RLE must have the image's
    size, and runs that fill it exactly.
    """
    _parts(segmentation, height, width)


def check_points(points: Any, height: int, width: int, what: str = "polygon") -> np.ndarray:
    """Coordinates of one polygon, nested as they come, as float64 of the same shape, all of them usable.

    The last axis alternates x and y. Raises ValueError for what are no numbers, not finite or far outside.
    """
    try:
        found = np.asarray(points)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{what} is no even list of coordinates: {points!r:.80}") from error
    if found.size and found.dtype.kind not in "iuf":
        raise ValueError(f"{what} holds {points!r:.80}; expected numbers")
    if found.ndim == 0 or found.shape[-1] % 2:
        raise ValueError(f"{what} has shape {found.shape}; expected x and y in turn")
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{what} holds a coordinate that is not finite")
    for axis, side in enumerate((width, height)):
        values = found[..., axis::2]
        if values.size and (values.min() < -MARGIN * side or values.max() > (1 + MARGIN) * side):
            raise ValueError(
                f"{what} reaches from {values.min():g} to {values.max():g} in {'xy'[axis]}, "
                f"the image from 0 to {side}: more than {MARGIN} sides outside"
            )
    return found


def _parts(segmentation: Any, height: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Polygons (2 N,) float64 and runs (N,) int64 of a segmentation, all checked."""
    if not isinstance(segmentation, (list, dict)):
        raise ValueError(f"segmentation is a {type(segmentation).__name__}; expected polygons or RLE")
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    polygons, runs = [], []
    for part in parts:
        if isinstance(part, dict):
            runs.append(_runs(part, height, width))
        elif isinstance(part, list):
            polygon = check_points(part, height, width)
            if polygon.ndim != 1:
                raise ValueError(f"polygon has shape {polygon.shape}; expected [x0, y0, x1, y1, ...]")
            if polygon.size >= 6:
                polygons.append(polygon)
        else:
            raise ValueError(f"segmentation holds a {type(part).__name__}; expected polygons (lists) or RLEs (dicts)")
    if not polygons and not runs:
        raise ValueError("segmentation has no polygon of three points and no RLE")
    return polygons, runs


def _runs(rle: dict, height: int, width: int) -> np.ndarray:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"RLE has size {size!r}; the image has [{height}, {width}]")
    if isinstance(counts, (str, bytes)):
        runs = _uncompress(counts)
    elif isinstance(counts, list):
        runs = np.asarray(counts)
        if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
            raise ValueError(f"RLE has counts {counts!r:.80}; expected whole numbers")
    else:
        raise ValueError(f"RLE has counts of {type(counts).__name__}; expected a list, str or bytes")
    if runs.size and (runs.min() < 0 or runs.max() > height * width):  # before the sum: it could wrap around
        worst = runs.min() if runs.min() < 0 else runs.max()
        raise ValueError(f"RLE has a run of {worst}; expected 0 to {height * width}, the pixels of the image")
    total = int(runs.sum())
    if total != height * width:
        raise ValueError(f"RLE fills {total} pixels; the image has {height} x {width} = {height * width}")
    return runs


def _uncompress(counts: str | bytes) -> np.ndarray:
    """COCO's string of runs -> int64 (N,).

    A number is little-endian digits of 5 bits, each a character from "0" on, bit 5 saying that another follows; bit 4
    of the last is the sign. From the fourth run on they are differences to the run two before.
    """
    try:
        codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(f"RLE has counts {counts!r:.40}; expected COCO's characters") from error
    codes = codes.astype(np.int64) - 48
    if not codes.size:
        raise ValueError("RLE has no counts")
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("RLE has counts with a character that is not between '0' and 'o'")
    last = np.flatnonzero(codes < 32)
    if not last.size or last[-1] != codes.size - 1:
        raise ValueError("RLE has counts that break off within a number")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _DIGITS:
        raise ValueError(f"RLE has a number of {lengths.max()} digits; expected at most {_DIGITS}")
    place = np.arange(codes.size) - np.repeat(first, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    numbers -= np.where(codes[last] & 16, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _fill(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    values = np.arange(len(counts), dtype=np.uint8) & 1  # runs of 0 and of 1 in turn, down the columns
    return np.repeat(values, counts).reshape(width, height).T


def _draw(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    try:
        from pycocotools import mask as coco_mask  # not needed, and maybe absent, where no polygon is drawn
    except ImportError as error:
        raise ImportError("masks of polygons need pycocotools: pip install pycocotools") from error
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([one.tolist() for one in polygons], height, width)))
