"""The weights in the package: small enough, and they read the sentence on scenes they have never seen."""

from __future__ import annotations

import pytest

from magnet_fast import checkpoints
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
