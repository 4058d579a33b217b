"""The family's image and mask preparation: squashed to a square, ImageNet's mean and deviation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SCALE = torch.tensor([1.0 / (255.0 * std) for std in IMAGENET_STD]).view(3, 1, 1)
_SHIFT = torch.tensor([-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]).view(3, 1, 1)


def prepare_image(image: Image.Image | np.ndarray | str | os.PathLike[str], size: int) -> torch.Tensor:
    """Squash an image to `size` x `size` and normalise it; returns float32 (3, size, size).

    image: a PIL image of any mode, a uint8 array (H, W, 3) or (H, W), or a path. Resized by Pillow's bilinear
    filter, aspect ratio not kept, exactly as torchvision's resize does to PIL images (LAVT's released
    transforms). Raises TypeError for another kind of image, ValueError for another shape, dtype or size or an
    unreadable file.
    """
    return normalise(resize_image(image, size))


def resize_image(image: Image.Image | np.ndarray | str | os.PathLike[str], size: int) -> np.ndarray:
    """`prepare_image` without the normalisation: uint8 (size, size, 3)."""
    _check_size(size)
    return np.asarray(as_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W): scaled to 0..1, then (x - mean) / std per channel."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(torch.float32)
    return planes.mul_(_SCALE).add_(_SHIFT)


def prepare_mask(mask: np.ndarray, size: int) -> torch.Tensor:
    """Resize a mask (H, W), bool or integer, by nearest neighbour; returns uint8 (size, size) of 0, 1."""
    _check_size(size)
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"mask is a {type(mask).__name__}; expected a NumPy array (H, W)")
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise ValueError(f"mask has shape {mask.shape} and dtype {mask.dtype}; expected (H, W), bool or integer")
    binary = (mask != 0).astype(np.uint8)
    if binary.shape != (size, size):
        binary = np.array(Image.fromarray(binary).resize((size, size), Image.Resampling.NEAREST))
    return torch.from_numpy(binary)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, fully decoded.

    EXIF orientation is ignored: COCO's masks are drawn on the pixels as stored. Raises FileNotFoundError, or
    ValueError for an empty, truncated or otherwise unreadable file, both with the path.
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


def as_rgb(image: Image.Image | np.ndarray | str | os.PathLike[str]) -> Image.Image:
    """A PIL image in RGB from an image, an array or a path; see `prepare_image`."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image is a {type(image).__name__}; expected a PIL image, a uint8 array or a path")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"image has shape {image.shape} and dtype {image.dtype}; expected uint8 (H, W, 3) or (H, W)")
    return Image.fromarray(image).convert("RGB")


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size is {size!r}; expected an int")
    if size < 1:
        raise ValueError(f"size is {size}; expected at least 1")
