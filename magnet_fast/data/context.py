"""Tensors beside image and sentence that are made of the picture alone, for models that need them.

What a data set offers itself comes first; what it lacks and is named here is made, for training, evaluation and
`Segmenter` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from magnet_fast.data.superpixels import NONE, superpixels


class Maker(NamedTuple):
    """How a tensor of the context is made.

    Attributes:
        make: from a picture on its canvas, uint8 (h, w, 3), to uint8 (h, w).
        beside: its value where the canvas goes on beside the picture.
        package: which must be installed.
        extra: of this package that installs it.
    """

    make: Callable[[np.ndarray], np.ndarray]
    beside: int
    package: str
    extra: str


MAKERS: dict[str, Maker] = {"superpixels": Maker(superpixels, NONE, "skimage", "superpixels")}
"""By the tensor's name in the context."""


def makers_of(needs: Collection[str]) -> dict[str, Maker]:
    """The makers of those tensors that can be made.

    Raises:
        ImportError: the package of one is not installed.
    """
    found = {name: MAKERS[name] for name in needs if name in MAKERS}
    for name, maker in found.items():
        if find_spec(maker.package) is None:
            raise ImportError(
                f"the model needs {name}, which are made by {maker.package}: pip install 'magnet_fast[{maker.extra}]'"
            )
    return found


def on_canvas(maker: Maker, pixels: np.ndarray, side: int) -> np.ndarray:
    """What is made of a picture, as its canvas holds it: uint8 (side, side), the picture at the top left."""
    canvas = np.full((side, side), maker.beside, dtype=np.uint8)
    height, width = pixels.shape[:2]
    canvas[:height, :width] = maker.make(pixels)
    return canvas
