"""How objects are drawn that formats have in common: polygons and RLE as given, boxes, masks in files, runs in rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magnet_fast.data.importing.record import Drawing
from magnet_fast.data.segmentation import decode_segmentation
from magnet_fast.data.transforms.pictures import opened
from magnet_fast.data.values import shown

_GREY = ("I", "F")  # modes, with those of 16 bits, whose pixels Pillow does not make colours of without loss
_FARTHEST = 1e9  # pixels; false for NaN, too
_RUN = re.compile(r"\s*(\d{1,9})\s*", re.ASCII)


def outline(segmentation: Any) -> Drawing:
    """COCO's polygons or RLE in pixels, as they are."""
    return lambda height, width: segmentation


def box(corner: Sequence[Any], degrees: Any = 0, *, pivot: str = "corner") -> Drawing:
    """A rectangle.

    Args:
        corner: x and y of its upper left corner, width and height, in pixels.
        degrees: by which it is turned, clockwise.
        pivot: the point that stays in its place: "corner", the upper left one, or "centre".

    Raises ValueError for other values than finite numbers, and for a rectangle without an area.
    """
    values = [*corner, degrees]
    if len(values) != 5 or not all(map(is_number, values)):
        raise ValueError(f"box is {shown(list(corner))}, turned by {shown(degrees)}; expected x, y, width, height")
    x, y, width, height, _ = values
    if width <= 0 or height <= 0:
        raise ValueError(f"box has width {width:g} and height {height:g}; expected more than 0")
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    if not degrees % 360:
        return outline([[value for point in corners for value in point]])
    middle = (x, y) if pivot == "corner" else (x + width / 2, y + height / 2)
    turned = [value for point in corners for value in _turned(point, middle, math.radians(degrees))]
    # As a mask: a turned rectangle may well reach over the picture's edge.
    return lambda height, width: decode_segmentation([turned], height, width) != 0


def mask_file(path: Path) -> Drawing:
    """What is not black, and not transparent, in a picture of the size of the one it belongs to."""

    def draw(height: int, width: int) -> np.ndarray:
        with opened(path) as picture:
            if picture.format == "JPEG":
                raise ValueError(f"mask {path} is a JPEG, which is not quite black beside an object; expected a PNG")
            if (picture.height, picture.width) != (height, width):
                found = f"{picture.height} x {picture.width}"
                raise ValueError(
                    f"mask {path} is {found} pixels (height x width); expected {height} x {width}, its picture's size"
                )
            try:
                if picture.mode.startswith(_GREY):
                    return np.asarray(picture) > 0
                colours = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
            except Exception as error:  # of a broken file, many kinds
                raise ValueError(f"mask {path} cannot be read, {error}; expected a whole PNG") from error
        return colours[..., :3].any(axis=-1) & (colours[..., 3:] > 0).all(axis=-1)

    return draw


def runs_in_rows(runs: str, left: int, top: int, width: int, height: int) -> Drawing:
    """Runs of 0 and of 1 in turn, with commas between, that fill a box row by row."""

    def draw(image_height: int, image_width: int) -> np.ndarray:
        if min(left, top) < 0 or min(width, height) < 1 or left + width > image_width or top + height > image_height:
            raise ValueError(
                f"mask has the box {left}, {top}, {width}, {height}; expected one within {image_width} x {image_height}"
            )
        counts = _counts(runs, width * height)
        values = np.arange(len(counts)) % 2 == 1
        mask = np.zeros((image_height, image_width), dtype=bool)
        mask[top : top + height, left : left + width] = np.repeat(values, counts).reshape(height, width)
        return mask

    return draw


def is_number(value: Any) -> bool:
    """Whether a value is a number that may be a coordinate: finite, and no boolean."""
    return type(value) in (int, float) and -_FARTHEST < value < _FARTHEST


def _counts(runs: str, pixels: int) -> np.ndarray:
    """The runs as int64 (N,), checked to fill so many pixels."""
    if runs.count(",") > pixels:
        raise ValueError(f"rle has {runs.count(',') + 1} runs; expected at most {pixels + 1}, those of its box")
    found = [_RUN.fullmatch(one) for one in runs.split(",")]
    if None in found:
        raise ValueError(f"rle is {shown(runs)}; expected whole numbers with commas between")
    counts = np.array([int(one[1]) for one in found], dtype=np.int64)
    if counts.sum() != pixels:
        raise ValueError(f"rle has runs of {counts.sum()} pixels; expected {pixels}, those of its box")
    return counts


def _turned(point: tuple[float, float], about: tuple[float, float], angle: float) -> tuple[float, float]:
    """A point turned clockwise, y running down."""
    x, y = point[0] - about[0], point[1] - about[1]
    return about[0] + x * math.cos(angle) - y * math.sin(angle), about[1] + x * math.sin(angle) + y * math.cos(angle)
