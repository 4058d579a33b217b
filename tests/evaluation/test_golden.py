"""Scores equal what the released evaluators say (tests/golden/README.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from magnet_fast.evaluation import TASKS, Table, scores

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("part", ["all", "targets_only"])
def test_generalized(part: str) -> None:
    arrays = np.load(GOLDEN / "grefcoco_metrics.npz")
    released = json.loads((GOLDEN / "grefcoco_metrics.json").read_text())[part]
    columns = [torch.from_numpy(arrays[name]) for name in ("prediction", "truth", "no_target", "predicted_no_target")]
    if part == "targets_only":
        keep = ~columns[2]
        columns = [column[keep] for column in columns]
    prediction, truth, no_target, predicted_no_target = columns
    table = Table()
    table.add(prediction, truth, index=range(len(truth)), exists=~no_target, claimed=~predicted_no_target)
    found = scores(table, "generalized")
    for name in ("gIoU", "cIoU", "Pr@0.7", "Pr@0.8", "Pr@0.9"):
        assert found[name] == pytest.approx(released[name], abs=1e-9)
    if part == "all":  # released: fractions
        assert found["N-acc"] == pytest.approx(100 * released["N_acc"])
        assert found["T-acc"] == pytest.approx(100 * released["T_acc"])
    else:  # released: 0 for both where no sentence is without target; ours: what is not defined is NaN
        assert released["N_acc"] == released["T_acc"] == 0
        assert math.isnan(found["N-acc"])
        assert found["T-acc"] == pytest.approx(100 * (~predicted_no_target).double().mean().item())


def unpacked(runs: list[int], height: int, width: int) -> torch.Tensor:
    """Row-major run lengths, zeros first -> (1, H, W) bool."""
    values = torch.arange(len(runs)) % 2 == 1
    return values.repeat_interleave(torch.tensor(runs)).reshape(1, height, width)


@pytest.mark.parametrize("head", ["without_exist_head", "with_exist_head"])
@pytest.mark.parametrize("part", ["results", "edge_cases"])
def test_robust(part: str, head: str) -> None:
    """The edge cases, too: refs without positives, without negatives, a vanished target."""
    golden = json.loads((GOLDEN / "rris_metrics.json").read_text())
    size = golden["height"], golden["width"]
    refs, released = (
        (golden["refs"], golden["results"][head]["scores"])
        if part == "results"
        else (golden["edge_cases"]["refs"], golden["edge_cases"][head])
    )
    sentences = [(number, ref, sentence) for number, ref in enumerate(refs) for sentence in ref["sentences"]]
    table = Table()
    for index, (number, ref, sentence) in enumerate(sentences):
        claimed = None if head == "without_exist_head" else [sentence["exist_probability"] >= 0.5]
        table.add(
            unpacked(sentence["mask"], *size),
            unpacked(ref["target"], *size),
            index=[index],
            ref=[number],
            exists=[bool(sentence["exist"])],
            claimed=claimed,
        )
    found = scores(table, "robust")
    theirs = {"mIoU_ref": "mIoU", "mIoU": "mIoU_per_sentence"}
    for name in TASKS["robust"].scores:
        assert found[name] == pytest.approx(released[theirs.get(name, name)], abs=1e-9), name
