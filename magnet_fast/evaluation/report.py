"""Scores as a table to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from magnet_fast.evaluation.tasks import find_task

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MEANINGS = {
    "oIoU": "sum of intersections / sum of unions",
    "mIoU": "mean of the sentences' IoU",
    "gIoU": "mean IoU, where a sentence that names nothing scores 1 if nothing is claimed, else 0",
    "cIoU": "sum of intersections / sum of unions, false claims included",
    "N-acc": "sentences that name nothing and of which nothing is claimed",
    "T-acc": "sentences that name something and of which something is claimed",
    "mRR": "empty masks among a ref's sentences that fit nothing, mean over refs",
    "rIoU": "IoU of a ref's sentences, false masks included in the union, mean over refs",
    "mIoU_ref": "mean over refs of their sentences' mean IoU",
    "pointing": "the most probable pixel lies inside",
    "recall@10": "any of the 10 most probable pixels lies inside",
}
"""What names of scores mean, those that explain themselves left out."""

_TRUTHS = {"resized": "resized to it", "polygons": "drawn there from polygons"}


def score_table(results: Mapping[str, Any], title: str | None = None, note: str | None = None) -> RichTable:
    """What `evaluate` returns as a rich table: a row for all sentences and one for each kind.

    Args:
        results: of `evaluate`, for any task.
        title: above the table; the number of sentences is added.
        note: below the table, before the protocol and what the scores mean.
    """
    from rich.table import Table as RichTable

    names = find_task(results["task"]).scores
    meanings = [f"{name} = {MEANINGS[name]}" for name in names if name in MEANINGS]
    caption = "; ".join(filter(None, [_conditions(results), note, "percent"])) + ". " + "; ".join(meanings)
    table = RichTable(title=", ".join(filter(None, [title, f"{results['sentences']} sentences"])), caption=caption)
    table.add_column("sentences")
    table.add_column("count", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for label, scores in [("all", results), *results["by_kind"].items()]:
        # A score that is not defined (N-acc without such sentences) is a dash: nobody takes it for zero.
        cells = ("–" if math.isnan(scores[name]) else f"{scores[name]:.2f}" for name in names)
        table.add_row(label, str(scores["sentences"]), *cells)
    return table


def _conditions(results: Mapping[str, Any]) -> str:
    """The protocol, and where masks were compared."""
    size = results.get("image_size")
    at_input = results["resolution"] == "input"
    square = f" {size}x{size}" if at_input and size else ""
    truth = f", truth {_TRUTHS[results['truth']]}" if at_input and results.get("truth") else ""
    return f"protocol {results['protocol']} ({results['rules']}); {results['resolution']} resolution{square}{truth}"
