"""From JPEG files to batches: how many images a second a core prepares, and so how many cores keep a GPU busy.

Synthesised pictures of COCO's usual size (640×480, about 150 kB) with polygons in REFER's layout are read as RefCOCO
is: decode, squash to 480×480, normalise, polygons to mask, word pieces, batches of 8. "in this process" prepares
without a worker; the others use DataLoader's workers, whose start is not timed. The files lie in the page cache: disks
are not measured. `--full` takes 2 and 4 workers as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from magnet_fast.data import ExpressionDataset, Refer, Tokenizer

IMAGES, BATCH, SIZE = 64, 8, 480
_GROUP = f"data loading, {IMAGES} JPEG files 640×480 to {SIZE}×{SIZE}"


def write_pictures(root: Path) -> None:
    """RefCOCO's files over pictures of smooth colours with grain, one referent of two polygons in each."""
    folder = root / "images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    (root / "refcoco").mkdir()
    draw = np.random.default_rng(0)
    images, annotations, refs = [], [], []
    for number in range(IMAGES):
        coarse = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = draw.integers(-12, 13, smooth.shape, dtype=np.int16)
        name = f"COCO_train2014_{number:012}.jpg"
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / name, quality=92)
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        polygons = [
            np.stack([320 + x + r * np.cos(angles), 240 + r * np.sin(angles)], axis=1).ravel().round(2).tolist()
            for x, r in ((-80, 100), (120, 60))
        ]
        images.append({"id": number, "file_name": name, "height": 480, "width": 640})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "segmentation": polygons})
        sentence = {"sent_id": number, "raw": "the large red circle left of the small blue box", "tokens": []}
        sentence["sent"] = sentence["raw"]
        refs.append(
            {"ref_id": number, "ann_id": number, "image_id": number, "category_id": 1, "split": "train",
             "sent_ids": [number], "sentences": [sentence]}
        )  # fmt: skip
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "refcoco" / "instances.json").write_text(json.dumps(instances))
    (root / "refcoco" / "refs(unc).json").write_text(json.dumps(refs))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExpressionDataset]:
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    yield ExpressionDataset(Refer(root), "train", Tokenizer(max_tokens=20), SIZE, mode="refs")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_images_per_second(benchmark: Any, dataset: ExpressionDataset, workers: int, full: bool) -> None:
    if workers > 1 and not full:
        pytest.skip("more workers: --full")
    # Persistent, so that the starting of processes falls into the warm-up round.
    loader = DataLoader(
        dataset, BATCH, num_workers=workers, persistent_workers=workers > 0, collate_fn=dataset.collate,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    def run() -> None:
        for _ in loader:
            pass

    benchmark.group = _GROUP
    benchmark.extra_info.update(
        path="in this process" if workers == 0 else f"{workers} worker{'s' if workers > 1 else ''}",
        baseline="in this process",
        items=IMAGES,
    )
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("part", ["read and decode", "squash", "normalise", "polygons to mask", "collate"])
def test_parts(benchmark: Any, dataset: ExpressionDataset, part: str) -> None:
    """Where the time of an image goes, in this process."""
    picture, fit = dataset.load_image(0), dataset.fit
    pixels = fit.pixels(picture)
    items = [dataset[index] for index in range(BATCH)]
    runs = {
        "read and decode": lambda: [dataset.load_image(index) for index in range(BATCH)],
        "squash": lambda: [fit.pixels(picture) for _ in range(BATCH)],
        "normalise": lambda: [fit.normalise(pixels) for _ in range(BATCH)],
        "polygons to mask": lambda: [fit.mask(dataset.original_mask(index)) for index in range(BATCH)],
        "collate": lambda: dataset.collate(items),
    }
    benchmark.group = f"data loading, parts of {BATCH} images"
    benchmark.extra_info.update(path=part, baseline="read and decode", items=BATCH)
    benchmark.pedantic(runs[part], rounds=20, warmup_rounds=2)
