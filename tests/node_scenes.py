"""Small pictures of coloured blocks as complex queries with the nodes of each scene, in DuMoGa's files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 80, 220), "yellow": (230, 210, 40),
    "purple": (150, 50, 190), "orange": (240, 140, 30),
}  # fmt: skip
SIDE, CELLS, FEATURES = 60, 3, 16


def write_node_scenes(root: Path, images: dict[str, int], seed: int = 0) -> Path:
    """A split a name, with so many pictures; each has three to five blocks in cells of a grid, and two sentences.

    A node's features are its colour and its place: what a detector would say of it.
    """
    draw = random.Random(seed)
    folder = root / "ris_cq"
    for place in (folder / "imgSG/train2017", root / "images/train2017", root / "images/panoptic_train2017"):
        place.mkdir(parents=True)
    scenes, number = [], 0
    for split, count in images.items():
        queries = []
        for _ in range(count):
            number += 1
            queries += _scene(draw, root, f"{number:012}", scenes)
        (folder / f"{split}.json").write_text(json.dumps(queries))
    (folder / "for_pan_seg.json").write_text(json.dumps(scenes))
    return root


def _scene(draw: random.Random, root: Path, name: str, scenes: list[Any]) -> list[dict[str, Any]]:
    """The picture, its segments and features; its queries."""
    image, panoptic = np.full((SIDE, SIDE, 3), 200, np.uint8), np.zeros((SIDE, SIDE, 3), np.uint8)
    cells = draw.sample(range(CELLS**2), draw.randint(3, 5))
    colours = draw.sample(sorted(COLOURS), len(cells))
    step, nodes, features = SIDE // CELLS, [], []
    for cell, colour in zip(cells, colours, strict=True):
        row, column = divmod(cell, CELLS)
        part = slice(row * step + 3, (row + 1) * step - 3), slice(column * step + 3, (column + 1) * step - 3)
        image[part], panoptic[part] = COLOURS[colour], (cell + 1, 0, 0)
        nodes.append({"id": cell + 1})
        place = [*np.eye(CELLS)[row], *np.eye(CELLS)[column]]
        features.append([*np.eye(len(COLOURS))[sorted(COLOURS).index(colour)], *place, *[0.0] * 4])
    Image.fromarray(image).save(root / f"images/train2017/{name}.jpg")
    Image.fromarray(panoptic).save(root / f"images/panoptic_train2017/{name}.png")
    (root / f"ris_cq/imgSG/train2017/{name}.jpg.json").write_text(json.dumps({"roifeatures": features}))
    files = {"file_name": f"train2017/{name}.jpg"}
    scenes.append({**files, "pan_seg_file_name": f"panoptic_train2017/{name}.png", "segments_info": nodes})
    return [
        {
            **files,
            "sentence": f"the {colours[node]} square",
            "pan_seg_file": f"panoptic_train2017/{name}.png",
            "id": cells[node] + 1,
        }
        for node in draw.sample(range(len(cells)), 2)
    ]
