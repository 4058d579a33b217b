"""oIoU, mIoU and P@X by hand and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_fast.evaluation import ReferringSegmentationMetrics, intersection_and_union


def scores_of(counts: list[tuple[int, int]], kinds: list | None = None) -> dict:
    metrics = ReferringSegmentationMetrics()
    metrics.update_counts([i for i, _ in counts], [u for _, u in counts], range(len(counts)), kinds)
    return metrics.compute()


def test_by_hand() -> None:
    scores = scores_of([(50, 100), (9, 10), (0, 40), (0, 0)], ["a", "b", "a", None])
    assert scores["oIoU"] == pytest.approx(100 * 59 / 150)
    assert scores["mIoU"] == pytest.approx(100 * (0.5 + 0.9 + 0 + 0) / 4)
    assert [scores[f"P@{x}"] for x in (0.5, 0.6, 0.7, 0.8, 0.9)] == [50, 25, 25, 25, 25]
    assert scores["sentences"] == 4
    assert set(scores["by_kind"]) == {"a", "b"}
    assert scores["by_kind"]["a"]["oIoU"] == pytest.approx(100 * 50 / 140)
    assert scores["by_kind"]["a"]["mIoU"] == pytest.approx(25)
    assert scores["by_kind"]["b"]["P@0.9"] == 100
    assert scores["by_kind"]["b"]["sentences"] == 1


def test_overall_and_mean_are_not_confused() -> None:
    """A large wrong mask weighs on oIoU, a small one on mIoU as much as any."""
    scores = scores_of([(1000, 1000), (0, 10)])
    assert scores["oIoU"] > 99
    assert scores["mIoU"] == 50


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_thresholds_are_reached_by_equality(threshold: float) -> None:
    tenths = round(10 * threshold)
    for scale in (1, 3, 7, 1001):
        assert scores_of([(tenths * scale, 10 * scale)])[f"P@{threshold}"] == 100
        assert scores_of([(tenths * scale - 1, 10 * scale)])[f"P@{threshold}"] == 0


def test_no_sentences() -> None:
    scores = ReferringSegmentationMetrics().compute()
    assert scores["sentences"] == 0
    assert math.isnan(scores["oIoU"]) and math.isnan(scores["mIoU"]) and math.isnan(scores["P@0.5"])


def test_nothing_to_find_and_nothing_found_counts_zero() -> None:
    scores = scores_of([(0, 0)])
    assert (scores["oIoU"], scores["mIoU"], scores["P@0.5"]) == (0, 0, 0)


@given(seed=st.integers(0, 1000), batch=st.integers(1, 6), split=st.integers(0, 6))
def test_against_brute_force_in_any_batches_and_order(seed: int, batch: int, split: int) -> None:
    generator = np.random.default_rng(seed)
    shape = (batch, *generator.integers(1, 9, 2))
    prediction, truth = generator.random(shape) > 0.5, generator.random(shape) > 0.5
    if batch > 1:
        prediction[0], truth[0] = False, False
    expected_i = [sum(bool(a and b) for a, b in zip(p.flat, t.flat)) for p, t in zip(prediction, truth)]  # noqa: B905
    expected_u = [sum(bool(a or b) for a, b in zip(p.flat, t.flat)) for p, t in zip(prediction, truth)]  # noqa: B905
    ious = [i / u if u else 0.0 for i, u in zip(expected_i, expected_u, strict=True)]

    metrics = ReferringSegmentationMetrics()
    cut = min(split, batch)
    for start, end in ((cut, batch), (0, cut)):  # later sentences first
        metrics.update(
            torch.from_numpy(prediction[start:end]),
            torch.from_numpy(truth[start:end]).to(torch.uint8),
            range(start, end),
        )
    scores = metrics.compute()
    assert scores["oIoU"] == pytest.approx(100 * sum(expected_i) / max(sum(expected_u), 1))
    assert scores["mIoU"] == pytest.approx(100 * sum(ious) / batch)
    for x in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert scores[f"P@{x}"] == pytest.approx(100 * sum(iou >= x - 1e-12 for iou in ious) / batch)
    assert scores["sentences"] == batch


def test_order_of_arrival_does_not_change_a_bit() -> None:
    counts = [(i * 7 % 13, 13 + i) for i in range(100)]
    forward, backward = ReferringSegmentationMetrics(), ReferringSegmentationMetrics()
    for index, (i, u) in enumerate(counts):
        forward.update_counts([i], [u], [index])
    for index, (i, u) in reversed(list(enumerate(counts))):
        backward.update_counts([i], [u], [index])
    assert forward.compute() == backward.compute()


def test_bad_counts_and_shapes() -> None:
    with pytest.raises(ValueError, match="sentence 0: intersection 5 must lie between 0 and the union 4"):
        scores_of([(5, 4)])
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and \(2, 3, 4\)"):
        intersection_and_union(torch.zeros(2, 3, 3), torch.zeros(2, 3, 4))
