"""Tasks: which scores a kind of data is judged by, and which of them chooses the best model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from magnet_fast.evaluation.metrics import DEFAULT_RULE, Rows, Rule, answers, metric
from magnet_fast.evaluation.table import Table


class Task(NamedTuple):
    """A list of scores.

    Attributes:
        scores: names, in the order of printing; `metrics.metric` says what there is.
        best: the score by which the best model is kept, more is better.
        named_only: oIoU, mIoU and P@X are those of the sentences that name something, with masks emptied where the
            model claims nothing. Otherwise of every sentence, with masks as they are.
    """

    scores: tuple[str, ...]
    best: str
    named_only: bool = False


_PRECISIONS = ("P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9")

TASKS: dict[str, Task] = {
    # A sentence names one object: RefCOCO and its kin.
    "single": Task(("oIoU", "mIoU", *_PRECISIONS), best="oIoU"),
    # None, one or several: gRefCOCO.
    "generalized": Task(("gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"), best="gIoU"),
    # One, or nothing in this image: R-RefCOCO.
    "robust": Task(("mRR", "rIoU", "mIoU_ref", "oIoU", "mIoU", *_PRECISIONS), best="rIoU", named_only=True),
    # A command names a place: Talk2Car-RegSeg. The counts of pixels are our choice.
    "region": Task(("pointing", "recall@10", "recall@100", "recall@1000", "oIoU", "mIoU"), best="mIoU"),
}


def find_task(task: str | Task) -> Task:
    """A task by name, or as it comes.

    Raises:
        ValueError: for a name that is no task's.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return TASKS[task]


def scores(table: Table, task: str | Task = "single", rule: Rule = DEFAULT_RULE) -> dict[str, Any]:
    """The scores of a task in percent, by name, NaN where one is not defined.

    Args:
        table: sentences, gathered from all processes.
        task: one of `TASKS`, or a list of scores of one's own.
        rule: how IoUs are read; see `protocol.PROTOCOLS`.

    Returns:
        The task's scores, `sentences` (how many), and `by_kind`: the same for each kind of sentence.

    Raises:
        ValueError: for an unknown task, where the table lacks what a score needs (`ref`, `probability`), or holds a
            prediction of NaN.
    """
    task = find_task(task)
    rows = table.rows()
    kinds: dict[str, list] = defaultdict(list)
    for row in rows:
        if row.kind is not None:
            kinds[row.kind].append(row)
    return {
        **_scores(rows, task, rule),
        "by_kind": {kind: _scores(kinds[kind], task, rule) for kind in sorted(kinds)},
    }


def _scores(rows: Rows, task: Task, rule: Rule) -> dict[str, Any]:
    named = answers(rows) if task.named_only else rows
    found: dict[str, Any] = {}
    for name in task.scores:
        plain = name in ("oIoU", "mIoU") or name.startswith("P@")
        found[name] = metric(name)(named if plain else rows, rule)
    return {**found, "sentences": len(rows)}
