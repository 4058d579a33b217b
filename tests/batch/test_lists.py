"""A segmenter asked about several images in one call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from magnet_fast import Segmenter, models
from magnet_fast.data import Tokenizer
from magnet_fast.data.transforms import as_rgb

SENTENCES = ["the red circle", "the star", "the blue box", "the moon", "the large circle", "the square"]


def test_each_pair_is_answered_as_by_itself(segmenter: Segmenter, pictures: Path) -> None:
    """Pictures of several sizes, more than a batch, some again, as paths, arrays and prepared."""
    a, b, c = (pictures / name for name in ("a.png", "b.jpg", "c.png"))
    images = [a, b, str(a), segmenter.prepare(c), np.asarray(as_rgb(b)), a]
    found = segmenter(images, SENTENCES)
    shapes = [(37, 61), (50, 20), (37, 61), (64, 64), (50, 20), (37, 61)]
    assert [one.mask.shape for one in found] == shapes
    for image, sentence, one in zip(images, SENTENCES, found, strict=True):
        alone = segmenter(image, sentence)
        assert np.allclose(one.probability, alone.probability, atol=1e-5)
        assert np.array_equal(one.mask, one.probability > 0.3)
        assert one.presence == pytest.approx(alone.presence, abs=1e-5) and one.reading == alone.reading
    assert np.ptp([one.probability.mean() for one in found]) > 1e-6


def test_one_sentence_for_all_and_empty_lists(segmenter: Segmenter, pictures: Path) -> None:
    images = [pictures / "a.png", pictures / "c.png"]
    for one, other in zip(segmenter(images, "circle"), segmenter(images, ["circle", "circle"]), strict=True):
        assert np.array_equal(one.probability, other.probability)
    assert len(segmenter(images[:1], "circle")) == 1  # a list stays one
    assert segmenter([], []) == segmenter([], "circle") == []


def test_a_picture_is_read_once_and_looked_at_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = models.create("cris_tiny", input={"size": 32, "max_tokens": 16}).eval()
    segmenter = Segmenter(model, Tokenizer(max_tokens=16), keep_masks=True, batch_size=4)
    looked, read = [], []
    look, prepare = segmenter._look, segmenter.prepare

    def noted(pixels: torch.Tensor) -> list[torch.Tensor]:
        seen = look(pixels)
        looked.append((len(pixels), *{len(one) for one in seen}))
        return seen

    monkeypatch.setattr(segmenter, "_look", noted)
    monkeypatch.setattr(segmenter, "prepare", lambda image: read.append(image) or prepare(image))
    a, b = pictures / "a.png", pictures / "b.jpg"
    images = [a, b, a, b, b, b]
    found = segmenter(images, SENTENCES)
    assert read == [a, b] and looked == [(2, 2), (1, 1)]
    monkeypatch.undo()
    for image, sentence, one in zip(images, SENTENCES, found, strict=True):
        assert np.allclose(one.probability, segmenter(image, sentence).probability, atol=1e-5)


def test_bad_lists(segmenter: Segmenter, pictures: Path) -> None:
    a = pictures / "a.png"
    with pytest.raises(ValueError, match="expression: expected one for each of 2 images, got 3"):
        segmenter([a, a], SENTENCES[:3])
    with pytest.raises(ValueError, match=r"image\[1\]: image has shape \(4, 4, 4\)"):
        segmenter([a, np.zeros((4, 4, 4), np.uint8)], "circle")
    with pytest.raises(FileNotFoundError, match=r"image\[2\]: image .*none\.png does not exist"):
        segmenter([a, a, pictures / "none.png"], "circle")
    with pytest.raises(TypeError, match=r"image\[0\]: image is a int"):
        segmenter([7], "circle")
    with pytest.raises(ValueError, match="expression 1 is empty"):
        segmenter([a, a], ["circle", " "])
    for count in (0, "16", True, 2.0):
        with pytest.raises(ValueError, match=f"batch_size: expected at least 1, got {count!r}"):
            Segmenter(models.create("lavt_tiny"), Tokenizer(), batch_size=count)
