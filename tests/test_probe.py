"""The probe of a model's maps: means under masks, and what a linear classifier makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import probe
from magnet_fast import models
from magnet_fast.data.scenes.writing import write_scenes
from magnet_fast.training.building import build_model
from magnet_fast.training.config import load_config


def test_a_mean_counts_pixels_by_their_share_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 3, 5, generator=generator)
    mask = (torch.rand(2, 8, 12, generator=generator) > 0.6).float()
    found = probe.mean(features, mask)
    for one in range(2):
        total, weight = np.zeros(5), 0.0
        for y, x in np.ndindex(4, 3):
            share = mask[one, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4].mean().item()
            total, weight = total + share * features[one, y, x].numpy(), weight + share
        np.testing.assert_allclose(found[one], total / weight, rtol=1e-5)
    assert torch.equal(probe.mean(features, torch.zeros(2, 8, 12)), torch.zeros(2, 5))


def test_a_classifier_says_what_is_there_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    words, truth = (torch.randint(3, (count,), generator=generator) * 7 + 100 for count in (400, 300))
    noise, other = (torch.randn(count, 6, generator=generator) for count in (400, 300))
    assert 20 < probe.accuracy(noise, words, other, truth) < 47
    told = [rows + 8 * torch.eye(6)[(names - 100) // 7] for rows, names in ((noise, words), (other, truth))]
    assert probe.accuracy(told[0], words, told[1], truth) > 99


@pytest.mark.slow
def test_a_run_as_it_is_left(tmp_path: Path) -> None:
    """Of an untrained model: an object's mean colour tells its name, in the picture itself."""
    scenes = write_scenes(tmp_path / "scenes", 60, 3, level="easy", image_size=64)
    config = load_config("lavt_tiny_scenes_grounding", [f"data.root={scenes}", "data.image_size=64"])
    torch.manual_seed(0)
    models.save(build_model(config), tmp_path / "last.safetensors")
    found = probe.probe(tmp_path, config)
    assert {"colour", "shape"} <= found.keys()
    colour = found["colour"]
    assert colour["words"] > 0 and len(colour["read"]) == 1 + 4  # the image and four maps
    assert colour["read"][0] > colour["most_frequent"] + 20
