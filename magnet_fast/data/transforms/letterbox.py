"""CRIS's letterbox and its way back, as the released code does them with OpenCV 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from magnet_fast.data.transforms.fit import Fit
from magnet_fast.data.transforms.pictures import Picture, as_mask, as_rgb

BORDER = (123.0, 117.0, 104.0)
"""Grey levels around the picture, red, green, blue [released]."""

_Kernel = Callable[[np.ndarray], tuple[int, np.ndarray]]
_CUBIC = -0.75  # Keys' parameter in OpenCV and torch


class Letterbox(Fit):
    """The picture keeps its aspect ratio and stands in the middle of the square.

    With s = min(S / H, S / W) and borders b = ((S - W s) / 2, (S - H s) / 2), the pixel (x, y), integers at pixel
    centres, goes to (s x + b_x, s y + b_y): no half-pixel shift, and no smoothing where the picture shrinks. Images and
    the way back are bicubic, masks bilinear. Coordinates are rounded to 1/32 pixel, as OpenCV 4 does, whose pictures
    the published scores were measured on; OpenCV 5 does not round (2 grey levels, 0.002 in a probability).
    """

    def pixels(self, image: Picture) -> np.ndarray:
        """uint8 (S, S, 3), bicubic, `BORDER` around."""
        picture = torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1).to(torch.float32)  # (3, H, W)
        border = torch.tensor(BORDER, device="cpu").view(3, 1, 1)
        warped = _resample(picture - border, *self._forward(picture.shape[-2:], _cubic)) + border
        return warped.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

    def soft_mask(self, mask: np.ndarray) -> Tensor:
        """A mask (H, W) -> float32 (S, S) from 0 to 1, bilinear and soft at its border: the released training target.

        It is rounded to 255 levels, as released.
        """
        grey = torch.from_numpy(as_mask(mask)).to(torch.float32) * 255
        return _resample(grey, *self._forward(grey.shape, _linear)).round_() / 255

    def mask(self, mask: np.ndarray) -> Tensor:
        """uint8 (S, S): where `soft_mask` exceeds one half [our choice]."""
        return (self.soft_mask(mask) > 0.5).to(torch.uint8)

    def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse map, bicubic, 0 outside: may leave [0, 1] a little beside an edge, as released."""
        self._check_canvas(canvas)
        scale, (top, left) = self._place(size)
        rows = _taps(size[0], self.size, scale, top, _cubic)
        columns = _taps(size[1], self.size, scale, left, _cubic)
        return _resample(canvas, rows, columns)

    def _place(self, size: tuple[int, int]) -> tuple[float, tuple[float, float]]:
        """The scale s and the borders (top, left) of a picture of `size`."""
        height, width = size
        scale = min(self.size / height, self.size / width)
        return scale, ((self.size - height * scale) / 2, (self.size - width * scale) / 2)

    def _forward(self, size: tuple[int, int], kernel: _Kernel) -> tuple[_Taps, _Taps]:
        scale, borders = self._place(size)
        rows, columns = (
            _taps(self.size, side, 1 / scale, -border / scale, kernel)
            for side, border in zip(size, borders, strict=True)
        )
        return rows, columns


class _Taps(NamedTuple):
    """What one side of a separable resampling reads: indices and weights (length, taps), weight 0 outside."""

    indices: Tensor
    weights: Tensor


def _taps(length: int, source: int, slope: float, offset: float, kernel: _Kernel) -> _Taps:
    """Taps for `length` pixels that read a side of `source` pixels at slope * x + offset."""
    # OpenCV 4's fixed point: 10 bits while adding, of which 5 remain.
    place = (int(np.rint(1024 * offset)) + 16 + np.rint(1024 * slope * np.arange(length)).astype(np.int64)) >> 5
    first, weights = kernel((place & 31) / 32.0)
    indices = (place >> 5)[:, None] + first + np.arange(weights.shape[1])
    inside = (indices >= 0) & (indices < source)
    weights = np.where(inside, weights, 0.0).astype(np.float32)
    return _Taps(torch.from_numpy(indices.clip(0, source - 1)), torch.from_numpy(weights))


def _linear(t: np.ndarray) -> tuple[int, np.ndarray]:
    """First tap, and weights (n, 2), at the fractions t."""
    return 0, np.stack([1 - t, t], axis=1)


def _cubic(t: np.ndarray) -> tuple[int, np.ndarray]:
    """First tap, and weights (n, 4) of Keys' kernel, at the fractions t."""
    a = _CUBIC

    def near(x: np.ndarray) -> np.ndarray:  # for |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # for 1 <= |x| <= 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return -1, np.stack([far(1 + t), near(t), near(1 - t), far(2 - t)], axis=1)


def _resample(planes: Tensor, rows: _Taps, columns: _Taps) -> Tensor:
    """(..., H, W) float -> (..., H', W'), columns first."""
    return _along_last(_along_last(planes, columns).mT, rows).mT


def _along_last(planes: Tensor, taps: _Taps) -> Tensor:
    indices, weights = taps.indices.to(planes.device), taps.weights.to(planes)
    return sum(planes[..., indices[:, k]] * weights[:, k] for k in range(weights.shape[1]))
