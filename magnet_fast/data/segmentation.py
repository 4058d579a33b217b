"""COCO's segmentations, polygons or RLE, checked before any of it reaches native code, and as masks.

pycocotools draws what it is given: coordinates that are not finite, or far outside, cost memory without bound, and runs
that do not fit the mask are written past its end. So everything here is checked first, with a reason in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from magnet_fast.data.transforms.pictures import resize_nearest
from magnet_fast.data.values import MAX_PIXELS, MAX_SIDE, shown

MARGIN = 3  # image sides by which a coordinate may lie outside: annotators slip off an edge, not that far
MAX_OUTLINE = 1 << 21  # pixels, all polygons together: pycocotools keeps some 100 bytes for each
MAX_PARTS = 1 << 16  # polygons and RLEs of one segmentation: a second of work, whatever they hold
MAX_DRAWN = 1 << 32  # pixels, the image's times the parts: seconds of work
MAX_CHARACTERS = 1 << 22  # of compressed counts: more than a mask of noise has
_DIGITS = 7  # of 5 bits each, for one run: 35 bits, more than any image has pixels
_DEEPEST = 4  # levels of lists, those of GeoJSON's MultiPolygon
_EXPECTED = "expected [[x1, y1, x2, y2, ...], ...] or RLE"


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) of bool as COCO's compressed RLE: `size` [H, W] and `counts`, text, as pycocotools reads them."""
    from pycocotools import mask as coco_mask  # may be absent where no mask is written

    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A segmentation of COCO's as a mask, uint8 (height, width) of 0 and 1.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels (their union), an RLE dict of `size` and
            `counts`, compressed (str or bytes) or not (list), or a list of RLEs (their union); or what
            `usable_parts` makes these of.
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


def bounding_box(mask: np.ndarray) -> list[int] | None:
    """COCO's box [left, top, width, height] of a mask (H, W), in pixels; None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def usable_parts(segmentation: Any) -> list[list | dict]:
    """Polygons and RLEs of a segmentation, nested as COCO nests them; their values are not looked at.

    Polygons may also come flat ([x0, y0, ...] alone), in points ([[x0, y0], ...]) or in lists too many. Left out are
    polygons of fewer than three points or of an odd number of values, as the field's readers do, and empty RLEs.

    Raises ValueError for what is nested in no such way.
    """
    if segmentation is None:
        return []
    if not isinstance(segmentation, (list, dict)):
        raise ValueError(f"segmentation is {shown(segmentation)}; {_EXPECTED}")
    return [
        part
        for part in _unnest(segmentation, _DEEPEST)
        if (part.get("counts") if isinstance(part, dict) else _is_whole(part))
    ]


def check_points(points: list, height: int, width: int) -> np.ndarray:
    """Coordinates [x0, y0, x1, y1, ...] of one polygon as float64 (2 N,), all of them usable.

    Raises ValueError for what are no numbers, an odd number of them, not finite or far outside.
    """
    if not set(map(type, points)) <= {int, float}:  # NumPy would make text of all where one is text
        odd = next(value for value in points if type(value) not in (int, float))
        raise ValueError(f"polygon holds {shown(odd)}; expected numbers")
    if len(points) % 2:
        raise ValueError(f"polygon has {len(points)} numbers; expected x and y in turn")
    try:
        found = np.array(points, dtype=np.float64)
    except OverflowError:
        found = np.full(len(points), np.inf)
    if not np.isfinite(found).all():
        raise ValueError("polygon holds a coordinate that is not finite")
    for axis, side in enumerate((width, height)):
        values = found[axis::2]
        if values.size and (values.min() < -MARGIN * side or values.max() > (1 + MARGIN) * side):
            raise ValueError(
                f"polygon reaches from {values.min():g} to {values.max():g} in {'xy'[axis]}, "
                f"the image from 0 to {side}: more than {MARGIN} times that side outside"
            )
    return found


def join_points(points: list) -> list | None:
    """[[x0, y0], [x1, y1], ...] as [x0, y0, x1, y1, ...]; None for what is no list of points."""
    if not all(isinstance(point, list) and len(point) == 2 for point in points):
        return None
    joined = list(chain.from_iterable(points))
    return None if any(isinstance(value, (list, dict)) for value in joined) else joined


def _is_whole(polygon: list) -> bool:
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def _unnest(part: list | dict, deepest: int) -> Iterator[list | dict]:
    if isinstance(part, dict) and part and "counts" not in part:
        raise ValueError(f"segmentation holds {shown(part)}, without counts; {_EXPECTED}")
    if isinstance(part, dict) or (_is_whole(part) and type(part[0]) in (int, float)):  # its values are checked later
        yield part
        return
    kinds = set(map(type, part))
    if not kinds & {list, dict}:
        yield part
        return
    if not kinds <= {list, dict}:
        odd = next(inner for inner in part if not isinstance(inner, (list, dict)))
        raise ValueError(f"segmentation holds {shown(odd)} beside lists; {_EXPECTED}")
    if len(part) > 2 and (joined := join_points(part)) is not None:
        yield joined
        return
    if deepest == 1:
        raise ValueError(f"segmentation is nested too deep, {shown(part)}; {_EXPECTED}")
    for inner in part:
        yield from _unnest(inner, deepest - 1)


def _parts(segmentation: Any, height: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Polygons (2 N,) float64 and runs (N,) int64 of a segmentation, all checked."""
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(f"the image has {height} x {width} pixels; expected at most {MAX_PIXELS} to draw on")
    parts = usable_parts(segmentation)
    if not parts:
        raise ValueError("segmentation has no polygon of three points (x and y in turn) and no RLE")
    most = min(MAX_PARTS, MAX_DRAWN // (height * width))
    if len(parts) > most:
        raise ValueError(f"segmentation has {len(parts)} parts; on {height} x {width} pixels expected at most {most}")
    polygons = [check_points(part, height, width) for part in parts if isinstance(part, list)]
    outline = sum(map(_outline, polygons))
    if outline > MAX_OUTLINE:
        raise ValueError(f"polygons have an outline of {outline:.0f} pixels; expected at most {MAX_OUTLINE}")
    return polygons, [_runs(part, height, width) for part in parts if isinstance(part, dict)]


def _outline(polygon: np.ndarray) -> float:
    """Length in pixels, a diagonal step counted as one: what pycocotools samples."""
    steps = np.abs(polygon.reshape(-1, 2) - np.roll(polygon, -2).reshape(-1, 2))
    return float(steps.max(axis=1).sum())


def _runs(rle: dict, height: int, width: int) -> np.ndarray:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"RLE has size {shown(size)}; the image has [{height}, {width}]")
    if isinstance(counts, (str, bytes)):
        runs = _uncompress(counts)
    elif isinstance(counts, list):
        runs = _whole_numbers(counts)
    else:
        raise ValueError(f"RLE has counts {shown(counts)}; expected a list, str or bytes")
    if runs.min() < 0 or runs.max() > height * width:  # before the sum: it could wrap around
        worst = runs.min() if runs.min() < 0 else runs.max()
        raise ValueError(f"RLE has a run of {worst:.0f}; expected 0 to {height * width}, the pixels of the image")
    runs = runs.astype(np.int64)
    total = int(runs.sum())
    if total != height * width:
        raise ValueError(f"RLE fills {total} pixels; the image has {height} x {width} = {height * width}")
    return runs


def _whole_numbers(counts: list) -> np.ndarray:
    """Runs as float64, which holds every number of pixels exactly."""
    if set(map(type, counts)) <= {int, float}:
        try:
            runs = np.array(counts, dtype=np.float64)
        except OverflowError:
            runs = np.array([np.inf])
        if not np.isnan(runs).any() and (runs == np.floor(runs)).all():
            return runs
    raise ValueError(f"RLE has counts {shown(counts)}; expected whole numbers")


def _uncompress(counts: str | bytes) -> np.ndarray:
    """COCO's string of runs -> int64 (N,).

    A number is little-endian digits of 5 bits, each a character from "0" on, bit 5 saying that another follows; bit 4
    of the last is the sign. From the fourth run on they are differences to the run two before.
    """
    if len(counts) > MAX_CHARACTERS:
        raise ValueError(f"RLE has counts of {len(counts)} characters; expected at most {MAX_CHARACTERS}")
    try:
        codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(f"RLE has counts {shown(counts)}; expected COCO's characters") from error
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
