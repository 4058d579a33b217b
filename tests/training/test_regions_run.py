"""RNR on commands and their regions, from the data to a mask, by the trainer that all models have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magnet_fast import Segmenter
from magnet_fast.training import train
from magnet_fast.training.config import parse_config

COMMANDS = ["park next to the bus", "stop there", "turn left", "wait behind the car"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, the left or the right half of each of them named."""
    folder = tmp_path_factory.mktemp("data") / "talk2car"
    (folder / "imgs").mkdir(parents=True)
    (folder / "masks").mkdir()
    draw, content = np.random.default_rng(0), {"train": {}, "val": {}}
    for index, command in enumerate(COMMANDS * 2):
        split, number = ("train", "val")[index // 4], index % 4
        content[split][str(number)] = {"command": command, "img": f"{split}{number}.png"}
        Image.fromarray(draw.integers(0, 255, (20, 36, 3), dtype=np.uint8)).save(folder / f"imgs/{split}{number}.png")
        mask = np.zeros((20, 36), dtype=np.uint8)
        mask[:, 18 * (number % 2) :][:, :18] = 255
        Image.fromarray(mask).save(folder / f"masks/gt_img_ann_{split}_{number}.png")
    (folder / "talk2car.json").write_text(json.dumps(content))
    return folder.parent


def test_rnr_trains_on_regions(root: Path, tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": {"name": "rnr_tiny", "overrides": {"fusion__side": 4}},
            "data": {"root": str(root), "dataset": "talk2car", "image_size": 32, "max_tokens": 12},
            "optimiser": {"lr": 1e-3},
            "task": "region",
            "max_steps": 2,
            "batch_size": 4,
            "validate_every": "2 steps",
            "precision": "float32",
            "device": "cpu",
        }
    )
    scores = train(config, tmp_path / "run")
    assert {"pointing", "recall@10", "recall@100", "recall@1000", "oIoU", "mIoU"} <= scores.keys()
    assert scores["recall@1000"] == 100  # of 1024 pixels of the square, half are the region's
    segmenter = Segmenter.from_checkpoint(tmp_path / "run" / "best.safetensors")
    assert segmenter.model.config.architecture == "rnr"
    assert segmenter(np.zeros((20, 36, 3), dtype=np.uint8), "turn left").mask.shape == (20, 36)
