"""An answer to take along: masks as PNG, as COCO's RLE, and numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magnet_fast.app.answer import Answer
from magnet_fast.data.segmentation import bounding_box, encode_mask


def write_files(answer: Answer, masks: list[np.ndarray], threshold: float, folder: Path) -> list[Path]:
    """Write an answer's masks at the picture's own size, upright.

    mask.png, or mask-1.png, mask-2.png, … where there are several sentences: white on black. rle.json: a list of COCO's
    RLEs in the sentences' order, as pycocotools reads them. answer.json: picture, model, threshold, and of each
    sentence what was found.

    Args:
        answer: what was found.
        masks: its masks at `threshold`.
        threshold: for answer.json.
        folder: exists and has none of these files.

    Returns:
        The files, in that order.
    """
    names = ["mask.png"] if len(masks) == 1 else [f"mask-{number}.png" for number in range(1, len(masks) + 1)]
    files = [folder / name for name in names]
    for file, mask in zip(files, masks, strict=True):
        Image.fromarray(mask.astype(np.uint8) * 255).save(file)
    for name, content in (
        ("rle.json", [encode_mask(mask) for mask in masks]),
        ("answer.json", summary(answer, masks, threshold)),
    ):
        files.append(folder / name)
        files[-1].write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return files


def summary(answer: Answer, masks: list[np.ndarray], threshold: float) -> dict[str, Any]:
    """What answer.json holds. `box` is [left, top, width, height] in pixels, null for an empty mask."""
    sentences = []
    for sentence, one, mask in zip(answer.sentences, answer.found, masks, strict=True):
        entry = {
            "sentence": sentence,
            "presence": one.presence,
            "area": int(mask.sum()),
            "box": bounding_box(mask),
            "highest_probability": float(one.probability.max()),
        }
        if one.reading is not None and not one.reading.complete:
            entry["not_read"] = list(one.reading.notes.values())
        sentences.append(entry)
    return {
        "picture": answer.name,
        "width": answer.picture.width,
        "height": answer.picture.height,
        "model": answer.model,
        "threshold": threshold,
        "sentences": sentences,
    }
