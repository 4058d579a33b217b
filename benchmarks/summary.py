"""What a results file keeps: every row of a suite with few groups; of the operators with hundreds of shapes, what a
document says of them. Numbers have four significant digits; compulsory bytes and operations are in the shares."""

from __future__ import annotations

import json
from itertools import groupby
from statistics import median_high
from typing import Any

MOST_GROUPS = 60
"""A suite with more of them has no rows in the file but spreads over its groups."""

_COUNTS = ("bytes", "flops")


def summarised(results: dict[str, Any]) -> dict[str, Any]:
    """Results as they are kept: "machine", "ceilings", "rows", and "spreads" of the suites that have many groups.

    A spread is over the shapes of one suite, dtype and direction (the last two parts of a group's name) by one path:
    their number, and the least, median and most of the ratios and of the medians of seconds.
    """
    suites = {name: list(rows) for name, rows in groupby(results["rows"], key=lambda row: row["suite"])}
    large = {name for name, rows in suites.items() if len({row["group"] for row in rows}) > MOST_GROUPS}
    rows = [row for name, members in suites.items() if name not in large for row in members]
    kept = {**results, "rows": [{key: row[key] for key in row if key not in _COUNTS} for row in rows]}
    if large:
        kept["spreads"] = [spread for name in suites if name in large for spread in _spreads(name, suites[name])]
    return rounded(kept)


def text(results: dict[str, Any]) -> str:
    """The file: a line for each row."""
    lists = {name: results[name] for name in ("rows", "spreads") if name in results}
    parts = [json.dumps({key: value for key, value in results.items() if key not in lists}, indent=1)[:-2]]
    for name, rows in lists.items():
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        parts.append(f' "{name}": [\n{lines}\n ]')
    return ",\n".join(parts) + "\n}\n"


def rounded(value: Any) -> Any:
    """Every float in it to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _spreads(suite: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((", ".join(row["group"].split(", ")[-2:]), row["path"]), []).append(row)
    return [
        {
            "suite": suite,
            "of": of,
            "path": path,
            "baseline": members[0]["baseline"],
            "shapes": len(members),
            "rounds": [min(row["rounds"] for row in members), max(row["rounds"] for row in members)],
            "ratio": _least_median_most([row["ratio"] for row in members if row["ratio"]]),
            "median_seconds": _least_median_most([row["median_seconds"] for row in members]),
        }
        for (of, path), members in found.items()
    ]


def _least_median_most(values: list[float]) -> list[float]:
    return [min(values), median_high(values), max(values)] if values else []
