"""What the tables and pictures of a study's report share."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from statistics import mean, stdev
from typing import Any

Runs = dict[str, list[dict[str, Any]]]
"""Finished runs by variant, in the order of their seeds."""

COLOURS = ("#7b8794", "#2878c8", "#c05020", "#3c8c50", "#8050b0", "#202020")
"""Of what a picture tells apart, in its order."""


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one; a dash where some run has none."""
    if any(isnan(value) for value in values):
        return "–"
    return f"{mean(values):.2f}" if len(values) == 1 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, its first column to the left."""
    rule = "|".join(["---", *("---:" for _ in head[1:])])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])
