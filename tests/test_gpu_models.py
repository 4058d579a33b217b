"""The measurement of whole models on a GPU, run on the CPU: its rows are whole, and a failing path is reported."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_models

pytestmark = pytest.mark.slow


def test_rows_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(gpu_models, "PATHS", ("reference", "ours"))  # compiling takes minutes here
    rows = list(gpu_models.rows(gpu_models.SMALL, torch.device("cpu"), rounds=1))
    assert [row["path"] for row in rows] == ["reference", "ours"] * 2
    assert {row["group"] for row in rows} == {
        "MagNet tiny 64x64, inference, batch 1, bfloat16",
        "MagNet tiny 64x64, training step, batch 2, bfloat16 autocast",
    }
    for row in rows:
        assert 0 < row["min_seconds"] <= row["median_seconds"]
        assert row["flops"] > 1e7
    assert [row["ratio"] for row in rows[::2]] == [1.0, 1.0]


def test_a_failing_path_leaves_the_others(monkeypatch) -> None:
    def fail(model, inputs, compiled):
        raise torch.OutOfMemoryError("too large\nfor this device")

    monkeypatch.setattr(gpu_models, "_inference", fail)
    monkeypatch.setattr(gpu_models, "PATHS", ("reference", "ours"))
    rows = list(gpu_models.rows(gpu_models.SMALL, torch.device("cpu"), rounds=1))
    assert [row.get("error") for row in rows[:2]] == ["OutOfMemoryError: too large"] * 2
    assert all("error" not in row for row in rows[2:])
