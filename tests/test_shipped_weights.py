"""The weights in the package: small enough, and they read the sentence on scenes they have never seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from magnet_fast import Segmenter, checkpoints, models
from magnet_fast.data import ExpressionDataset, Refer
from magnet_fast.data.scenes import write_scenes
from magnet_fast.evaluation import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> tuple[dict, dict]:
    root = tmp_path_factory.mktemp("scenes") / "hard"
    write_scenes(root, images=60, seed=20_001, level="hard")
    loaded = checkpoints.load()
    results = []
    for shuffled in (False, True):
        sentences = ExpressionDataset(Refer(root), "train", loaded.tokenizer(), loaded.model.spec)
        if shuffled:
            sentences.shuffle_expressions(seed=0)
        results.append(evaluate(loaded.model, sentences, batch_size=32))
    return results[0], results[1]


def test_they_segment_what_is_named(scores: tuple[dict, dict]) -> None:
    named, shuffled = scores
    assert named["sentences"] > 150
    assert named["mIoU"] > 54
    assert shuffled["mIoU"] < named["mIoU"] / 2


def test_they_are_small() -> None:
    assert checkpoints.shipped_weights().stat().st_size <= 10_000_000


CARD = Path(checkpoints.shipped_weights()).parent / "photos" / "README.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "photos_small.json"


@pytest.fixture(scope="module")
def photos() -> Segmenter:
    return Segmenter.from_checkpoint("photos")


def test_photographs(photos: Segmenter) -> None:
    """Three of scikit-image's, in the public domain: where the thing is, and where it is not."""
    from skimage import data

    cat, person, sky = (np.asarray(photos(getattr(data, name)(), sentence).mask) for name, sentence in (
        ("chelsea", "the cat"), ("astronaut", "the woman"), ("rocket", "the sky"),
    ))  # fmt: skip
    assert cat.mean() > 0.5 and cat[:60, -60:].mean() < 0.3  # it fills the picture but for the corner behind it
    assert person[60:180, 180:260].mean() > 0.7 and person[:150, 340:].mean() < 0.1  # her head; the shuttle
    assert sky[:200, 200:280].mean() > 0.9 and sky[-60:].mean() < 0.3
    ball = np.asarray(photos(data.astronaut(), "the ball").mask)
    assert ball.mean() < 0.2 < person.mean()  # it reads the sentence


def test_photos_are_as_described(photos: Segmenter) -> None:
    folder = CARD.parent
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20_000_000
    assert photos.spec.threshold == 0.2 and photos.tokenizer.vocab_size == 8000
    assert photos.tokenizer.readings(["the leftmost giraffe"])[0].complete
    results, card = json.loads(RESULTS.read_text()), CARD.read_text()
    assert results["val"]["mIoU"] >= 43 and results["val_sentences_shuffled"]["mIoU"] <= 8
    rows = [results["val"], *results["val"]["by_kind"].values(), results["val_sentences_shuffled"]]
    for row in rows:
        assert f"| {row['sentences']} | {row['mIoU']:.1f} | {row['P@0.5']:.1f} |" in card


def test_a_folder_of_that_name_is_not_in_the_way(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()  # of pictures
    assert checkpoints.load("photos").model.config.architecture == "photos"
    Path("photos").rmdir()
    models.save(models.create("lavt_tiny"), "photos")
    assert checkpoints.load("photos").model.config.architecture == "lavt"
    Path("photos").unlink()
    Path("photos").mkdir()
    models.save(models.create("lavt_tiny"), "photos/last.safetensors")  # a run's folder
    with pytest.raises((ValueError, OSError), match="is a folder"):
        checkpoints.load("photos")
    with pytest.raises(FileNotFoundError, match="'Photo' does not exist; did you mean 'photos', which ships"):
        checkpoints.load("Photo")
