"""Every score by hand, and against formulas written once more, a sentence at a time."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_fast.evaluation import TASKS, Rule, Table, Task, scores
from magnet_fast.evaluation.metrics import metric

PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


def masks_of(counts: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and truths of given intersection and union: the prediction lies inside the truth."""
    width = max([1, *(union for _, union in counts)])
    prediction = torch.zeros(len(counts), 1, width, dtype=torch.bool)
    truth = torch.zeros_like(prediction)
    for i, (intersection, union) in enumerate(counts):
        prediction[i, 0, :intersection] = True
        truth[i, 0, :union] = True
    return prediction, truth


def single(counts: list[tuple[int, int]], kinds: list | None = None, rule: Rule | None = None) -> dict:
    table = Table()
    table.add(*masks_of(counts), index=range(len(counts)), kind=kinds)
    return scores(table, "single", *([] if rule is None else [rule]))


def test_single_by_hand() -> None:
    found = single([(50, 100), (9, 10), (0, 40), (0, 0)], ["a", "b", "a", None])
    assert found["oIoU"] == pytest.approx(100 * 59 / 150)
    assert found["mIoU"] == pytest.approx(100 * (0.5 + 0.9 + 0 + 0) / 4)
    assert [found[f"P@{x}"] for x in PRECISIONS] == [50, 25, 25, 25, 25]
    assert found["sentences"] == 4
    assert set(found["by_kind"]) == {"a", "b"}
    assert found["by_kind"]["a"]["oIoU"] == pytest.approx(100 * 50 / 140)
    assert found["by_kind"]["a"]["mIoU"] == pytest.approx(25)
    assert found["by_kind"]["b"]["P@0.9"] == 100
    assert found["by_kind"]["b"]["sentences"] == 1


def test_overall_and_mean_are_not_confused() -> None:
    """A large wrong mask weighs on oIoU, a small one on mIoU as much as any."""
    found = single([(1000, 1000), (0, 10)])
    assert found["oIoU"] > 99
    assert found["mIoU"] == 50


@pytest.mark.parametrize("threshold", PRECISIONS)
def test_thresholds_are_reached_by_equality_unless_strict(threshold: float) -> None:
    tenths = round(10 * threshold)
    for scale in (1, 3, 7, 1001):
        equal, below, above = ([(tenths * scale + more, 10 * scale)] for more in (0, -1, 1))
        assert single(equal)[f"P@{threshold}"] == 100
        assert single(below)[f"P@{threshold}"] == 0
        strict = Rule(strict=True, epsilon=1e-6)
        assert single(equal, rule=strict)[f"P@{threshold}"] == 0
        assert single(above, rule=strict)[f"P@{threshold}"] == 100


def test_epsilon_is_added_to_the_union() -> None:
    assert single([(3, 4), (0, 0)], rule=Rule(epsilon=1.0))["mIoU"] == pytest.approx(100 * (3 / 5 + 0) / 2)


@pytest.mark.parametrize("task", TASKS)
def test_no_sentences(task: str) -> None:
    found = scores(Table(), task)
    assert found["sentences"] == 0 and found["by_kind"] == {}
    assert all(math.isnan(found[name]) for name in TASKS[task].scores)


def test_nothing_to_find_and_nothing_found_counts_zero() -> None:
    found = single([(0, 0)])
    assert (found["oIoU"], found["mIoU"], found["P@0.5"]) == (0, 0, 0)


# ---- a second implementation, a sentence at a time ----


def drawn(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Predictions, truths (those of a ref for its sentences that fit nothing, too), exists, claimed, refs."""
    generator = np.random.default_rng(seed)
    shape = (count, *generator.integers(1, 6, 2))
    prediction = generator.random(shape) > generator.choice([0.2, 0.5, 1.0], (count, 1, 1))
    truth = generator.random(shape) > generator.choice([0.3, 0.6, 1.0], (count, 1, 1))
    exists, claimed = generator.random((2, count)) > 0.4
    return prediction, truth, exists, claimed, generator.integers(0, 4, count).tolist()


def table_of(prediction, truth, exists, claimed, refs) -> Table:
    table = Table()
    table.add(
        torch.from_numpy(prediction),
        torch.from_numpy(truth),
        index=range(len(prediction)),
        ref=refs,
        exists=torch.from_numpy(exists),
        claimed=torch.from_numpy(claimed),
    )
    return table


def area(mask: np.ndarray) -> int:
    return sum(bool(pixel) for pixel in mask.flat)


def mean(values: list[float]) -> float:
    return 100 * sum(values) / len(values) if values else math.nan


def equal(found: dict, expected: dict) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True, abs=1e-9)


SEEDS = st.integers(0, 10_000)
COUNTS = st.integers(1, 9)


@given(seed=SEEDS, count=COUNTS)
def test_single_against_brute_force(seed: int, count: int) -> None:
    prediction, truth, *_, refs = drawn(seed, count)
    intersections = [area(p & t) for p, t in zip(prediction, truth, strict=True)]
    unions = [area(p | t) for p, t in zip(prediction, truth, strict=True)]
    ious = [i / u if u else 0.0 for i, u in zip(intersections, unions, strict=True)]
    every = np.ones(count, dtype=bool)
    expected = {
        "oIoU": 100 * sum(intersections) / max(sum(unions), 1),
        "mIoU": mean(ious),
        **{f"P@{x}": mean([iou >= x - 1e-12 for iou in ious]) for x in PRECISIONS},
    }
    equal(scores(table_of(prediction, truth, every, every, refs), "single"), expected)


@given(seed=SEEDS, count=COUNTS)
def test_generalized_against_brute_force(seed: int, count: int) -> None:
    prediction, truth, exists, claimed, refs = drawn(seed, count)
    ious, target_ious, intersection, union = [], [], 0, 0
    right_none, right_target = [], []
    for p, t, target, claim in zip(prediction, truth, exists, claimed, strict=True):
        if not target:
            right_none.append(not claim)
            ious.append(0.0 if claim else 1.0)
            union += area(p) if claim else 0
            continue
        right_target.append(bool(claim))
        union += area(p | t)
        iou = 0.0
        if claim:
            intersection += area(p & t)
            iou = area(p & t) / area(p | t) if area(p | t) else 0.0
        ious.append(iou)
        target_ious.append(iou)
    expected = {
        "gIoU": mean(ious),
        "cIoU": 100 * intersection / union if union else math.nan,
        "N-acc": mean(right_none),
        "T-acc": mean(right_target),
        **{f"Pr@{x}": mean([iou >= x - 1e-12 for iou in target_ious]) for x in (0.7, 0.8, 0.9)},
    }
    equal(scores(table_of(prediction, truth, exists, claimed, refs), "generalized"), expected)


@given(seed=SEEDS, count=COUNTS)
def test_robust_against_brute_force(seed: int, count: int) -> None:
    prediction, truth, exists, claimed, refs = drawn(seed, count)
    prediction_said = prediction & claimed[:, None, None]
    rejections, robust, ref_ious, all_ious, sum_i, sum_u = [], [], [], [], 0, 0
    for ref in sorted(set(refs)):
        mine = [i for i in range(count) if refs[i] == ref]
        false_pixels = [area(prediction_said[i]) for i in mine if not exists[i]]
        pairs = [(prediction_said[i], truth[i]) for i in mine if exists[i]]
        i_ref, u_ref = sum(area(p & t) for p, t in pairs), sum(area(p | t) for p, t in pairs)
        ious = [area(p & t) / area(p | t) if area(p | t) else 0.0 for p, t in pairs]
        if false_pixels:
            rejections.append(sum(pixels == 0 for pixels in false_pixels) / len(false_pixels))
        if pairs:
            whole = u_ref + sum(false_pixels)
            robust.append(i_ref / whole if whole else 0.0)
            ref_ious.append(sum(ious) / len(ious))
        all_ious, sum_i, sum_u = all_ious + ious, sum_i + i_ref, sum_u + u_ref
    expected = {
        "mRR": mean(rejections),
        "rIoU": mean(robust),
        "mIoU_ref": mean(ref_ious),
        "mIoU": mean(all_ious),
        "oIoU": 100 * sum_i / sum_u if sum_u else (0.0 if all_ious else math.nan),
        **{f"P@{x}": mean([iou >= x - 1e-12 for iou in all_ious]) for x in PRECISIONS},
    }
    equal(scores(table_of(prediction, truth, exists, claimed, refs), "robust"), expected)


@given(seed=SEEDS, count=COUNTS, k=st.integers(1, 12))
def test_region_against_brute_force(seed: int, count: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    shape = (count, *generator.integers(1, 5, 2))
    probability, truth = generator.random(shape), generator.random(shape) > 0.7
    table = Table()
    table.add(
        torch.from_numpy(probability > 0.5),
        torch.from_numpy(truth),
        index=range(count),
        probability=torch.from_numpy(probability),
    )
    best = [np.argsort(-p, axis=None, kind="stable") for p in probability]
    expected = {
        "pointing": mean([bool(t.flat[order[0]]) for t, order in zip(truth, best, strict=True)]),
        f"recall@{k}": mean([any(t.flat[i] for i in order[:k]) for t, order in zip(truth, best, strict=True)]),
    }
    equal(scores(table, Task(tuple(expected), best="pointing")), expected)
    assert scores(table, "region")["pointing"] == pytest.approx(expected["pointing"])


# ---- edges that the pages name ----


def one(prediction: str, truth: str, exists: bool, claimed: bool) -> dict:
    table = Table()
    stacks = [torch.tensor([[[pixel == "1" for pixel in mask]]]) for mask in (prediction, truth)]
    table.add(*stacks, index=[0], ref=[0], exists=[exists], claimed=[claimed])
    return scores(table, "generalized")


def test_generalized_edges() -> None:
    # No target and none claimed: 1, and nothing for the sums, whatever the mask.
    found = one("1111", "0000", False, False)
    assert found["gIoU"] == 100 and found["N-acc"] == 100
    assert math.isnan(found["cIoU"]) and math.isnan(found["T-acc"]) and math.isnan(found["Pr@0.7"])
    # No target but one claimed: 0, also if the mask is empty; the predicted area joins the union.
    assert one("0000", "0000", False, True)["gIoU"] == 0
    assert one("0110", "0000", False, True)["cIoU"] == 0
    # A target, none claimed: 0, and the union with the mask as it is.
    found = one("1110", "0111", True, False)
    assert (found["gIoU"], found["cIoU"], found["T-acc"], found["Pr@0.7"]) == (0, 0, 0, 0)
    # A target that vanished at this size, and an empty mask: 0 / 0 is 0.
    found = one("0000", "0000", True, True)
    assert (found["gIoU"], found["T-acc"]) == (0, 100) and math.isnan(found["cIoU"])
    assert math.isnan(found["N-acc"])


def test_robust_refs_without_one_or_the_other() -> None:
    """Each is left out of what it says nothing about; nothing becomes NaN for it."""
    table = Table()
    prediction = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
    truth = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 0]], [[1, 1, 0, 0]]], dtype=torch.bool)
    table.add(prediction, truth, index=[0, 1, 2], ref=[0, 1, 2], exists=[True, False, False])
    found = scores(table, "robust")
    assert (found["mIoU"], found["mIoU_ref"], found["oIoU"], found["rIoU"]) == (50, 50, 50, 50)
    assert found["mRR"] == 50  # of the refs 1 (one pixel is enough) and 2


def test_kinds_of_sentences_that_fit_nothing() -> None:
    """By kind, a score that these sentences do not bear on is NaN, never 0."""
    table = Table()
    stack = torch.tensor([[[1, 0]], [[0, 0]]], dtype=torch.bool)
    table.add(stack, stack, index=[0, 1], ref=[0, 0], exists=[True, False], kind=[None, "colour"])
    found = scores(table, "robust")["by_kind"]["colour"]
    assert found["mRR"] == 100 and found["sentences"] == 1
    assert math.isnan(found["rIoU"]) and math.isnan(found["oIoU"])


def test_region_of_nothing_is_never_found() -> None:
    table = Table()
    probability = torch.rand(1, 2, 2)
    table.add(probability > 2, probability > 2, index=[0], exists=[True], probability=probability)
    found = scores(table, "region")
    assert (found["pointing"], found["recall@1000"]) == (0, 0)


# ---- what is refused ----


def test_missing_columns_are_named() -> None:
    table = Table()
    stack = torch.ones(2, 1, 1, dtype=torch.bool)
    table.add(stack, stack, index=[5, 3])
    with pytest.raises(ValueError, match="ref: scores of refs need the id of each sentence's ref; sentence 3 came"):
        scores(table, "robust")
    with pytest.raises(ValueError, match="probability: pointing game and recall@k need it; sentence 3 came without"):
        scores(table, "region")


@pytest.mark.parametrize("name", ["", "IoU", "P", "P@", "P@half", "P@1/0", "recall@1.5", "recall@0", "oIoU@0.5"])
def test_unknown_scores(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"score: {name!r} is none; there are oIoU, mIoU, gIoU")):
        metric(name)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="task: expected one of single, generalized, robust, region, got 'multi'"):
        scores(Table(), "multi")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_tasks_name_their_best_score(task: Task) -> None:
    assert task.best in task.scores
