"""Pictures from files, arrays and Pillow, always as RGB."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray | str | os.PathLike[str]
"""A PIL image of any mode, a uint8 array (H, W, 3) or (H, W), or a path."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, fully decoded.

    EXIF orientation is ignored: COCO's masks are drawn on the pixels as stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated or otherwise unreadable. Both name the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"image {path} is empty (0 bytes)")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def as_rgb(image: Picture) -> Image.Image:
    """A PIL image in RGB.

    Raises:
        TypeError: it is neither a PIL image nor an array nor a path.
        ValueError: an array of another shape or dtype, or a file that `open_image` refuses.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image is a {type(image).__name__}; expected a PIL image, a uint8 array or a path")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"image has shape {image.shape} and dtype {image.dtype}; expected uint8 (H, W, 3) or (H, W)")
    return Image.fromarray(image).convert("RGB")


def as_mask(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W), bool or integer, as uint8 of 0 and 1.

    Raises:
        TypeError: it is no NumPy array.
        ValueError: it has another shape, or a dtype of neither kind.
    """
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"mask is a {type(mask).__name__}; expected a NumPy array (H, W)")
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise ValueError(f"mask has shape {mask.shape} and dtype {mask.dtype}; expected (H, W), bool or integer")
    return (mask != 0).astype(np.uint8)


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask uint8 (H, W) at another size (height, width), by Pillow's nearest neighbour."""
    if mask.shape == size:
        return mask
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
