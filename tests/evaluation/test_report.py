"""Every task's scores as a table, under their names, with protocol and resolution."""

from __future__ import annotations

import pytest
from rich.console import Console

from magnet_fast.evaluation import TASKS, evaluate, score_table

from .fakes import FakeDataset, FakeModel


def printed(results: dict, **options: str) -> str:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(score_table(results, **options))
    return " ".join(capture.get().split())


@pytest.mark.parametrize("task", TASKS)
def test_scores_under_their_names(task: str) -> None:
    results = evaluate(FakeModel(), FakeDataset(10), task=task, fast=False)
    text = printed(results, title="scenes val", note="expressions as annotated")
    assert "scenes val, 10 sentences" in text
    assert "protocol family" in text and "input resolution 16x16" in text and "expressions as annotated" in text
    for name in TASKS[task].scores:
        assert name in text
        assert (f"{results[name]:.2f}" if results[name] == results[name] else "–") in text
    assert "even" in text and "nan" not in text


def test_what_is_not_defined_is_a_dash() -> None:
    """N-acc where every sentence names something: nobody takes it for zero."""
    results = evaluate(FakeModel(), FakeDataset(4), task="generalized", fast=False)
    cells = list(score_table(results).columns[2 + TASKS["generalized"].scores.index("N-acc")].cells)
    assert cells == ["–", "–"]
