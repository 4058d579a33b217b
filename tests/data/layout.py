"""Two small roots in REFER's layout for the tests of bad input, and their writer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def small_instances() -> dict[str, Any]:
    """Two images of 20 x 30 (H x W) pixels and three annotations."""
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 20, "width": 30},
            {"id": 8, "file_name": "b.jpg", "height": 20, "width": 30},
        ],
        "annotations": [
            {"id": 70, "image_id": 7, "category_id": 1, "segmentation": [[2, 3, 10, 3, 10, 9, 2, 9]]},
            {"id": 71, "image_id": 7, "category_id": 1, "segmentation": [[20, 10, 25, 10, 25, 15, 20, 15]]},
            {"id": 80, "image_id": 8, "category_id": 1, "segmentation": [[0, 0, 30, 0, 30, 20, 0, 20]]},
        ],
        "categories": [{"id": 1, "name": "person"}],
    }


def small_ref(ref_id: int, ann_id: Any, image_id: int, *sentences: str, split: str = "train") -> dict[str, Any]:
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 1,
        "image_id": image_id,
        "file_name": "not the image's name.jpg",
        "split": split,
        "sent_ids": [10 * ref_id + i for i in range(len(sentences))],
        "sentences": [
            {"sent_id": 10 * ref_id + i, "raw": text, "sent": text.lower(), "tokens": text.lower().split()}
            for i, text in enumerate(sentences)
        ],
    }


def small_refs() -> list[dict[str, Any]]:
    return [
        small_ref(1, 70, 7, "Left man", "man on left"),
        small_ref(2, 71, 7, "woman"),
        small_ref(3, 80, 8, "everything", "the whole picture", split="val"),
    ]


def write_root(
    root: Path,
    *,
    instances: dict[str, Any] | None = None,
    refs: Any = None,
    image_folder: str = "images/mscoco/images/train2014",
    name: str = "refs(unc).p",
    dataset: str = "refcoco",
) -> Path:
    (root / dataset).mkdir(parents=True)
    instances = small_instances() if instances is None else instances
    refs = small_refs() if refs is None else refs
    (root / dataset / "instances.json").write_text(json.dumps(instances))
    content = pickle.dumps(refs, protocol=2) if name.endswith(".p") else json.dumps(refs).encode()
    (root / dataset / name).write_bytes(content)
    folder = root / image_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file_name in ("a.jpg", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / file_name)
    return root
