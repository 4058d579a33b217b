"""A scene with two sentences, and a model that finds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magnet_fast import models
from magnet_fast.app.examples import drawn_scenes
from magnet_fast.data import Tokenizer


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> tuple[Path, list[str]]:
    picture, text = drawn_scenes(1, size=96)[0]
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    picture.save(path)
    return path, text.splitlines()


@pytest.fixture(scope="session")
def absent(tmp_path_factory) -> Path:
    """A checkpoint of a model that says of every sentence that it names nothing."""
    torch.manual_seed(0)
    model = models.create("refsegformer_tiny", input={"size": 48, "max_tokens": 16, "threshold": 0.35}).eval()
    with torch.no_grad():
        model.presence.classify.bias.fill_(-4.0)
    path = tmp_path_factory.mktemp("absent") / "absent.safetensors"
    models.save(model, path, {"tokenizer_vocab": Tokenizer().digest()})
    return path
