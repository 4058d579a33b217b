"""Photographs that tests draw: ellipses of known colours, and a data set of them in REFER's layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from magnet_fast.data.phrases import Photograph
from magnet_fast.data.segmentation import encode_mask

COLOURS = {"red": (200, 20, 20), "green": (20, 160, 20), "blue": (30, 40, 200), "white": (245, 245, 245)}
THINGS = ("person", "dog", "cup", "traffic light")
STUFF = ("sky-other-merged", "grass-merged")


def photograph(seed: int, side: int = 36, most: int = 7) -> Photograph:
    """Ellipses of known colours before stuff, the later ones in front."""
    draw = random.Random(seed)
    pixels = np.full((side, side, 3), 128, dtype=np.uint8)
    masks, names, things, crowds = [], [], [], []
    for _ in range(draw.randint(0, most)):
        thing = draw.random() < 0.8
        rows, columns = np.mgrid[:side, :side]
        y, x, h, w = (draw.uniform(0, side), draw.uniform(0, side), draw.uniform(2, 14), draw.uniform(2, 14))
        mask = ((rows - y) / h) ** 2 + ((columns - x) / w) ** 2 <= 1
        for other in masks:
            other &= ~mask
        pixels[mask] = COLOURS[draw.choice(list(COLOURS))]
        masks.append(mask)
        names.append(draw.choice(THINGS if thing else STUFF))
        things.append(thing)
        crowds.append(thing and draw.random() < 0.05)
    seen = [i for i, mask in enumerate(masks) if mask.any()]
    return Photograph(
        pixels,
        np.stack([masks[i] for i in seen]) if seen else np.zeros((0, side, side), bool),
        tuple(names[i] for i in seen),
        np.array([things[i] for i in seen], bool),
        np.array([crowds[i] for i in seen], bool),
        np.zeros(len(seen), bool),
    )


def write_photographs(root: Path) -> Path:
    """Five photographs in REFER's layout: four to train, one of them named by both splits, and one for validation."""
    (root / "images").mkdir()
    (root / "own").mkdir()
    names = [*THINGS, *STUFF]
    images, annotations, refs = [], [], []
    several = [photo for seed in range(40) if len((photo := photograph(seed, side=64)).names) > 2]
    for number, photo in enumerate(several[:5]):
        Image.fromarray(photo.pixels).save(root / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        for name, mask, crowd in zip(photo.names, photo.masks, photo.crowds, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1 + names.index(name),
                 "iscrowd": int(crowd), "segmentation": encode_mask(mask)}
            )  # fmt: skip
        for split in ["train"] * (number < 4) + ["val"] * (number >= 3):
            sentence = {"sent_id": len(refs), "raw": "it", "sent": "it", "tokens": ["it"]}
            refs.append({"ref_id": len(refs), "ann_id": annotations[-1]["id"], "image_id": number, "split": split,
                         "sentences": [sentence]})  # fmt: skip
    categories = [{"id": 1 + i, "name": name, "isthing": int(name in THINGS)} for i, name in enumerate(names)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (root / "own" / "instances.json").write_text(json.dumps(instances))
    (root / "own" / "refs(unc).json").write_text(json.dumps(refs))
    return root
