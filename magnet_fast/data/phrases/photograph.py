"""A photograph with the regions that are known in it, and what is measured of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

_CLEAR = 0.004  # share of the picture from which on a region can be named by itself [our choice]


@dataclass(frozen=True)
class Photograph:
    """Pixels and regions on one canvas.

    Attributes:
        pixels: uint8 (H, W, 3).
        masks: bool (R, H, W), what is to be seen of each region; regions may overlap.
        names: the class of each region, as the data call it.
        things: bool (R,), whether a region is one countable object; False for stuff such as sky.
        crowds: bool (R,), whether a region is several objects of its class in one mask.
        vague: bool (R,), whether so little is left of a region that no sentence should name it alone.
    """

    pixels: np.ndarray
    masks: np.ndarray
    names: tuple[str, ...]
    things: np.ndarray
    crowds: np.ndarray
    vague: np.ndarray

    @cached_property
    def areas(self) -> np.ndarray:
        """(R,) share of the picture."""
        counts = [np.count_nonzero(mask) for mask in self.masks]
        return np.array(counts, dtype=np.float64) / max(1, self.pixels.shape[0] * self.pixels.shape[1])

    @cached_property
    def boxes(self) -> np.ndarray:
        """(R, 4) left, top, right, bottom from 0 to 1; zeros for a region of which nothing is to be seen."""
        found = np.zeros((len(self.masks), 4))
        height, width = self.pixels.shape[:2]
        for row, mask in zip(found, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if rows.size:
                row[:] = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
        return found

    @cached_property
    def centres(self) -> np.ndarray:
        """(R, 2) x and y of the boxes' middles."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @cached_property
    def clear(self) -> np.ndarray:
        """bool (R,), whether a sentence may name a region by itself."""
        return (self.areas >= _CLEAR) & ~self.vague & ~self.crowds

    @cached_property
    def members(self) -> dict[str, list[int]]:
        """Regions of each class, the vague ones and crowds among them."""
        found: dict[str, list[int]] = {}
        for region, name in enumerate(self.names):
            found.setdefault(name, []).append(region)
        return found

    def only(self, regions: np.ndarray) -> Photograph:
        """The photograph with some of its regions, given as bool (R,)."""
        return replace(
            self,
            masks=self.masks[regions],
            names=tuple(name for name, kept in zip(self.names, regions, strict=True) if kept),
            things=self.things[regions],
            crowds=self.crowds[regions],
            vague=self.vague[regions],
        )
