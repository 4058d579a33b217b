"""Maps that lie one after the other in a sequence, as research code tells them: two tensors of whole numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Maps(NamedTuple):
    """What was read.

    Attributes:
        sizes: height and width of each map.
        starts: where each map is said to begin.
        ends: where each would begin if it began at the end of the one before.
    """

    sizes: list[tuple[int, int]]
    starts: list[int]
    ends: list[int]


def read_maps(shapes: Tensor, starts: Tensor) -> Maps:
    """Read maps back, at once: on a GPU that waits for all that was computed before.

    Args:
        shapes: (L, 2), height and width of each map.
        starts: (L), where each begins.
    """
    numbers = torch.cat([shapes.flatten(), starts.flatten().to(shapes.device)]).tolist()
    count = 2 * len(shapes)
    sizes = list(zip(numbers[0:count:2], numbers[1:count:2], strict=True))
    ends = [0]
    for height, width in sizes:
        ends.append(ends[-1] + height * width)
    return Maps(sizes, numbers[count:], ends[:-1])
