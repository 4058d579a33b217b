"""How a picture comes to the square canvas that a model reads, and how what the model says comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from magnet_fast.data.transforms.pictures import Picture, as_mask, as_rgb, resize_nearest
from magnet_fast.models.contract import Prediction, check_side, probability


class Fit(ABC):
    """One way to bring pictures of any size to an S x S canvas; `open_fit` makes it from an `InputSpec`.

    `pixels`, then `normalise`, is what `image` does: what lies between, uint8, is what a cache keeps.

    Attributes:
        size: S.
        mean, std: of the channels red, green, blue, for values from 0 to 1.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        check_side(size, "size", least=1)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean is {mean}, std is {std}; expected three numbers each, std above 0")
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self._scale = torch.tensor([1.0 / (255.0 * one) for one in std], device="cpu").view(3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device="cpu").view(3, 1, 1)

    def image(self, image: Picture) -> Tensor:
        """A picture -> float32 (3, S, S), normalised."""
        return self.normalise(self.pixels(image))

    @abstractmethod
    def pixels(self, image: Picture) -> np.ndarray:
        """A picture -> uint8 (h, w, 3), resized; (h, w) is `extent` of its size."""

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """What `pixels` returns -> float32 (3, S, S): scaled to 0..1, then (x - mean) / std per channel."""
        planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(torch.float32)
        return planes.mul_(self._scale).add_(self._shift)

    @abstractmethod
    def mask(self, mask: np.ndarray) -> Tensor:
        """A mask (H, W), bool or integer, -> uint8 (S, S) of 0 and 1, in the image's place."""

    def extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, on the canvas, of what `pixels` makes of a picture of `size` (height, width)."""
        return self.size, self.size

    @abstractmethod
    def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
        """A map on the canvas, float (..., S, S), -> (..., height, width) of the picture it came from."""

    def probability(self, prediction: Prediction, size: tuple[int, int]) -> Tensor:
        """The probability at the pictures' own `size` (height, width): (B, height, width) float32."""
        return self.back(probability(prediction, (self.size, self.size)), size)

    def _check_canvas(self, canvas: Tensor) -> None:
        if canvas.ndim < 2 or tuple(canvas.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"canvas has shape {tuple(canvas.shape)}; expected (..., {self.size}, {self.size})")


class Squash(Fit):
    """The picture fills the square, its aspect ratio not kept: LAVT's, MagNet's and ReLA's way.

    Resized by Pillow's bilinear filter, as torchvision's resize does to PIL images (LAVT's released transforms); masks
    by nearest neighbour.
    """

    def pixels(self, image: Picture) -> np.ndarray:
        """uint8 (S, S, 3)."""
        return np.asarray(as_rgb(image).resize((self.size, self.size), Image.Resampling.BILINEAR))

    def mask(self, mask: np.ndarray) -> Tensor:
        """uint8 (S, S), by nearest neighbour."""
        return torch.from_numpy(resize_nearest(as_mask(mask), (self.size, self.size)))

    def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
        """Bilinear with aligned corners, as this family of models resizes its logits."""
        self._check_canvas(canvas)
        return _bilinear(canvas, size, align_corners=True)

    def probability(self, prediction: Prediction, size: tuple[int, int]) -> Tensor:
        """The logits straight to `size`, as released: one resize, not two."""
        return probability(prediction, size)


class Longest(Fit):
    """The longest side becomes S, the rest is padded with zeros at the right and at the bottom, after normalisation.

    SAM's way (its `ResizeLongestSide`, `preprocess` and `postprocess_masks`): Pillow's bilinear filter, sides rounded
    half up. Masks by nearest neighbour [our choice].
    """

    def pixels(self, image: Picture) -> np.ndarray:
        """uint8 (h, w, 3), the larger of h and w being S."""
        picture = as_rgb(image)
        height, width = self.extent((picture.height, picture.width))
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """float32 (3, S, S), zeros beside the picture."""
        return self._pad(super().normalise(pixels))

    def mask(self, mask: np.ndarray) -> Tensor:
        """uint8 (S, S), by nearest neighbour; 0 beside the picture."""
        binary = as_mask(mask)
        return self._pad(torch.from_numpy(resize_nearest(binary, self.extent(binary.shape))))

    def extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) on the canvas."""
        scale = self.size / max(size)
        height, width = (max(1, int(side * scale + 0.5)) for side in size)
        return height, width

    def back(self, canvas: Tensor, size: tuple[int, int]) -> Tensor:
        """The picture's part of the canvas, resized bilinearly, corners not aligned."""
        self._check_canvas(canvas)
        height, width = self.extent(size)
        return _bilinear(canvas[..., :height, :width], size, align_corners=False)

    def _pad(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        return F.pad(picture, (0, self.size - width, 0, self.size - height))


def _bilinear(canvas: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    planes = canvas.reshape(1, -1, *canvas.shape[-2:])
    resized = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=align_corners)
    return resized.reshape(*canvas.shape[:-2], *size)
