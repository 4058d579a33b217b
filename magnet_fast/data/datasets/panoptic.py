"""COCO's panoptic PNGs: a colour is a segment's id."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from magnet_fast.data.datasets.base import read_picture
from magnet_fast.data.values import shown

LARGEST = (1 << 24) - 1  # id that a colour can hold; 0 is no segment


def read_segments(path: Path) -> np.ndarray:
    """Segment ids, int32 (H, W): red + 256 green + 65536 blue. Raises ValueError for what is no coloured picture."""
    colour = read_picture(path, "RGB", stored_as=("RGB", "RGBA", "P")).astype(np.int32)
    return colour[..., 0] + 256 * colour[..., 1] + 65536 * colour[..., 2]


def require_segment(value: object, where: str) -> int:
    """The id of a segment. Raises ValueError for what no colour can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise ValueError(f"{where} has id {shown(value)}; expected 1 to {LARGEST}, a colour of the panoptic PNG")
    return value
