"""Edit what a mask covers, and nothing else: operations by name, or any function of an image.

After text-guided manipulation by referring image segmentation (GCCE 2021, ICASSP 2022, IEEE Access 2023): the sentence
says what is changed, the mask confines the change, all else stays. There a GAN makes the change; here anything may.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageFilter, ImageOps

from magnet_fast.data.transforms import Picture, as_mask, as_rgb, as_shown

Change = Callable[[np.ndarray], np.ndarray]
"""An image (H, W, 3) uint8 to one of its size, (H, W, 3) or with opacity (H, W, 4), uint8."""

_BLUR = 8.0
_WIDEST = 1000  # pixels, of a blur or a feather


@dataclass(frozen=True)
class Outside:
    """A change of what the mask does not cover; what it covers stays: `Outside(grey())`.

    Raises TypeError for what is no function, a name among them.
    """

    change: Change

    def __post_init__(self) -> None:
        if not callable(self.change):
            raise TypeError(f"change: expected a function of an image, such as editing.grey(), got {self.change!r}")


Operation = Change | Outside


def edited(image: Picture, mask: np.ndarray, operation: str | Operation, feather: int = 0) -> Image.Image:
    """An image with an operation done where a mask is: M · changed + (1 - M) · image.

    M is the mask, feathered inside: it rises in equal steps from its border, within `feather` pixels of it, to 1. The
    picture's frame is no border. So the image is bit-equal where the mask is not, and changed without a trace of the
    image deep inside. Of an `Outside` the two change places [our choice].

    Args:
        image: the pixels as the mask lies, `data.transforms.as_shown` of a photo; an EXIF orientation is not read.
        mask: (H, W), bool or integer.
        operation: a name (see `OPERATIONS`), one of this file's, or any `Change`.
        feather: in pixels, at most 1000; 0 for a hard border.

    Returns:
        RGB; RGBA where the operation returns opacity.

    Raises:
        TypeError, ValueError: no such operation, or its result is no image of this size; a mask of another size
            or of probabilities, a feather below 0 or too wide.
    """
    operation = find(operation)
    pixels = np.asarray(as_rgb(image))
    mask = as_mask(mask)
    if mask.shape != pixels.shape[:2]:
        raise ValueError(f"mask: expected shape {pixels.shape[:2]}, the image's, got {mask.shape}")
    if isinstance(feather, bool) or not isinstance(feather, int) or not 0 <= feather <= _WIDEST:
        raise ValueError(f"feather: expected a whole number of pixels, 0 to {_WIDEST}, got {feather!r}")
    outside = isinstance(operation, Outside)
    changed = _changed(operation.change if outside else operation, pixels)
    below, above = (changed, pixels) if outside else (pixels, changed)
    mixed = _mixed(_opaque(below), _opaque(above), _depth(mask, feather + 1), feather + 1)
    return Image.fromarray(np.ascontiguousarray(mixed[..., : changed.shape[2]]))


def find(operation: str | Operation) -> Operation:
    """The operation that "name" or "name=value" says; a function or an `Outside` as it is.

    Raises:
        TypeError, ValueError: there is none, or the value is none of its.
        FileNotFoundError: the background's file does not exist.
    """
    if isinstance(operation, Outside) or callable(operation):
        return operation
    if not isinstance(operation, str):
        raise TypeError(f"operation: expected a name or a function, got {type(operation).__name__}")
    name, given, value = operation.partition("=")
    make = OPERATIONS.get(name)
    if make is None:
        raise ValueError(f"operation: expected one of {', '.join(OPERATIONS)}, got {operation!r}")
    values = inspect.signature(make).parameters.values()
    if given and not values:
        raise ValueError(f"operation: expected {name} without a value, got {operation!r}")
    if not value and (given or any(one.default is one.empty for one in values)):
        raise ValueError(f"operation: expected {name}=VALUE, got {operation!r}")
    return make(value) if given else make()


def colour(value: str) -> Change:
    """Paint in a colour, "#ff0000" or "red", lit as before: the colour times each pixel's brightest channel."""
    try:
        paint = ImageColor.getrgb(value)
    except (AttributeError, TypeError, ValueError):  # Pillow's, of what is no text
        paint = ()
    if len(paint) != 3:
        raise ValueError(f"colour: expected #rrggbb or a name such as red, got {value!r}")
    table = (np.arange(256)[:, None] * np.array(paint) / 255).round().astype(np.uint8)
    return lambda image: table[image.max(axis=2)]


def blur(radius: float | str = _BLUR) -> Change:
    """Gauss's blur, of a radius in pixels."""
    radius = _number("blur", radius, _WIDEST)
    return lambda image: np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def grey() -> Change:
    """Take the colour away: Pillow's luma, of ITU-R BT.601."""
    return lambda image: np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def brightness(factor: float | str) -> Change:
    """Multiply; above 1 is brighter."""
    factor = _number("brightness", factor, 255.0)
    table = (np.arange(256) * factor).round().clip(0, 255).astype(np.uint8)
    return lambda image: table[image]


def cut_out() -> Outside:
    """Leave nothing outside: opacity 0, and black, so that nothing can be brought back."""
    return Outside(lambda image: np.zeros((*image.shape[:2], 4), np.uint8))


def background(picture: Picture) -> Outside:
    """Another picture outside, upright, scaled to cover and cut to the image's size around its middle."""
    shown = as_shown(picture)
    return Outside(lambda image: np.asarray(ImageOps.fit(shown, image.shape[1::-1], Image.Resampling.LANCZOS)))


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "colour": colour,
    "blur": blur,
    "grey": grey,
    "brightness": brightness,
    "cut-out": cut_out,
    "background": background,
}
"""Operations by name; each makes one of the value behind its "="."""


def _number(name: str, value: float | str, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= most:
        raise ValueError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")
    return number


def _changed(change: Change, pixels: np.ndarray) -> np.ndarray:
    changed = np.asarray(change(pixels.copy()))  # it may write to what it gets
    if changed.dtype != np.uint8 or changed.shape not in [(*pixels.shape[:2], channels) for channels in (3, 4)]:
        raise ValueError(
            f"operation: expected an array {pixels.shape} uint8 from it, got {changed.shape} {changed.dtype}"
        )
    return changed


def _opaque(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) with full opacity; (H, W, 4) as it is."""
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]) if image.shape[2] == 3 else image


def _depth(mask: np.ndarray, most: int) -> np.ndarray:
    """How many steps, diagonal ones too, lead to outside a mask of 0 and 1: (H, W) int32, 0 outside, at most `most`."""
    if mask.all() or not mask.any():  # no border: of a mask that fills the frame no step leads to it
        return mask.astype(np.int32) * most
    depth = np.zeros(mask.shape, np.int32)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    # With a pixel of what is outside around it, where there is one: the frame is no border.
    box = (slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2))
    inner = Image.fromarray(mask[box])
    depth[box] += np.asarray(inner)
    for _ in range(most - 1):
        inner = inner.filter(ImageFilter.MinFilter(3))
        if not inner.getbbox():
            break
        depth[box] += np.asarray(inner)
    return depth


def _mixed(below: np.ndarray, above: np.ndarray, weight: np.ndarray, whole: int) -> np.ndarray:
    """`weight` of `whole` parts of `above`, the rest of `below`: RGBA, opacity not multiplied into the colours.

    In whole numbers, so that what has no part in a pixel leaves no trace in it.
    """
    mixed = np.where((weight == whole)[..., None], above, below)
    soft = (weight > 0) & (weight < whole)
    parts = weight[soft][:, None]
    upper, lower = above[soft].astype(np.int64), below[soft].astype(np.int64)
    opacity = parts * upper[:, 3:], (whole - parts) * lower[:, 3:]
    total = sum(opacity)
    colours = (opacity[0] * upper[:, :3] + opacity[1] * lower[:, :3] + total // 2) // np.maximum(total, 1)
    mixed[soft] = np.concatenate([colours, (total + whole // 2) // whole], axis=1)
    return mixed
