"""Pictures and masks to a model's canvas, and what it says back to the picture: squash, letterbox, longest."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from magnet_fast.data.transforms.fit import Fit, Longest, Squash
from magnet_fast.data.transforms.letterbox import Letterbox
from magnet_fast.data.transforms.pictures import Picture, as_mask, as_rgb, as_shown, open_image, orientation
from magnet_fast.models.contract import InputSpec

__all__ = [
    "Fit", "Letterbox", "Longest", "Picture", "Squash",
    "as_mask", "as_rgb", "as_shown", "open_fit", "open_image", "orientation", "prepare_image", "prepare_mask",
]  # fmt: skip


_FITS = {"squash": Squash, "letterbox": Letterbox, "longest": Longest}


def open_fit(spec: InputSpec) -> Fit:
    """The fit that a specification names.

    Raises:
        TypeError, ValueError: the specification's `fit`, `size`, `mean` or `std` is none that can be.
    """
    if spec.fit not in _FITS:
        raise ValueError(f"fit is {spec.fit!r}; expected one of {', '.join(_FITS)}")
    return _FITS[spec.fit](spec.size, spec.mean, spec.std)


def prepare_image(image: Picture, size: int) -> Tensor:
    """Squash a picture to `size` x `size` with ImageNet's mean and deviation: float32 (3, size, size).

    The family's default, `Squash.image`, in short.
    """
    return open_fit(InputSpec(size=size)).image(image)


def prepare_mask(mask: np.ndarray, size: int) -> Tensor:
    """Squash a mask (H, W), bool or integer, by nearest neighbour: uint8 (size, size) of 0 and 1."""
    return open_fit(InputSpec(size=size)).mask(mask)
