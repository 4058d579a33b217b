"""Exact polygons of a pixel mask, in COCO's form."""

from __future__ import annotations

import numpy as np

_Corner = tuple[int, int]


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Outline a bool mask (H, W) along its pixel edges: COCO polygons [x0, y0, x1, y1, ...], one per part.

    Decoding them with pycocotools gives the mask back exactly: integer corners on pixel edges suffer no
    rounding. COCO's polygons have no holes, so a mask with holes becomes one polygon whose loops are joined
    by cuts that run there and back; COCO fills by the even-odd rule, which such a cut leaves without a trace.
    """
    loops = _boundary_loops(np.asarray(mask, dtype=bool))
    corners = [_straighten(loop) for loop in loops]
    if all(_signed_area(loop) > 0 for loop in corners):
        return [[value for corner in loop for value in corner] for loop in corners]
    start = corners[0][0]
    joined = []
    for loop in corners:
        joined += [*loop, loop[0], start]
    return [[value for corner in joined for value in corner]]


def _boundary_loops(mask: np.ndarray) -> list[list[_Corner]]:
    """Closed walks along pixel edges, the mask to the right: clockwise around parts, else around holes."""
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), dtype=np.int8)
    padded[1:-1, 1:-1] = mask
    follow: dict[_Corner, list[_Corner]] = {}
    across = np.diff(padded, axis=0)  # (H + 1, W + 2): +1 on a part's upper edge, -1 on its lower
    down = np.diff(padded, axis=1)  # (H + 2, W + 1): +1 on a part's left edge, -1 on its right
    ys, xs = np.nonzero(across)
    for x, y, step in zip((xs - 1).tolist(), ys.tolist(), across[ys, xs].tolist(), strict=True):
        begin, end = ((x, y), (x + 1, y)) if step > 0 else ((x + 1, y), (x, y))
        follow.setdefault(begin, []).append(end)
    ys, xs = np.nonzero(down)
    for x, y, step in zip(xs.tolist(), (ys - 1).tolist(), down[ys, xs].tolist(), strict=True):
        begin, end = ((x, y + 1), (x, y)) if step > 0 else ((x, y), (x, y + 1))
        follow.setdefault(begin, []).append(end)
    loops = []
    for start in sorted(follow, key=lambda corner: (corner[1], corner[0])):
        while follow[start]:
            loop, corner = [start], follow[start].pop()
            while corner != start:
                loop.append(corner)
                corner = follow[corner].pop()
            loops.append(loop)
    return loops


def _straighten(loop: list[_Corner]) -> list[_Corner]:
    """The loop without corners at which it does not turn."""
    return [
        corner
        for before, corner, after in zip([loop[-1], *loop[:-1]], loop, [*loop[1:], loop[0]], strict=True)
        if not (before[0] == corner[0] == after[0] or before[1] == corner[1] == after[1])
    ]


def _signed_area(loop: list[_Corner]) -> int:
    """Twice the area, positive for a clockwise loop (y runs down)."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(loop, [*loop[1:], loop[0]], strict=True))
