"""A tiny model of random weights, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from magnet_fast import Segmenter, models
from magnet_fast.data import Tokenizer

SIZES = {"a.png": (37, 61), "b.jpg": (50, 20), "c.png": (64, 64)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    # A threshold that random masks pass here and there.
    model = models.create("magnet_tiny", input={"size": 32, "max_tokens": 16, "threshold": 0.3})
    with torch.no_grad():
        model.head.mask_decoder.class_head.bias.copy_(torch.tensor([-9.0, 9.0]))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    models.save(model, path, {"tokenizer_vocab": Tokenizer().digest()})
    return path


@pytest.fixture(scope="session")
def segmenter(checkpoint: Path) -> Segmenter:
    return Segmenter.from_checkpoint(checkpoint, batch_size=4)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of `SIZES` (height, width)."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder
