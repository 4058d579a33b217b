"""Print a suite of a results file as a Markdown table: python -m benchmarks.table benchmarks/results/FILE.json SUITE"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path


def table(results: dict, suite: str) -> str:
    """A line a group: the baseline's median, the fastest other path's, their ratio, and the memory of both."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores ({machine['cpu_capability']}), {machine['threads']} threads"
        f", torch {machine['torch']}, {machine['date']}",
        "",
        "| | before | after | ratio | peak memory before | after |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in results["rows"] if row["suite"] == suite]
    for group, members in groupby(rows, key=lambda row: row["group"]):
        paths = {row["path"]: row for row in members}
        before = paths.pop(next(iter(paths.values()))["baseline"], None)
        if before is None or not paths:
            continue
        after = min(paths.values(), key=lambda row: row["median_seconds"])
        ratio = before["median_seconds"] / after["median_seconds"]
        lines.append(
            f"| {group} | {_time(before)} | {_time(after)} | **{ratio:.2f}×** | {_memory(before)} | {_memory(after)} |"
        )
    return "\n".join(lines)


def _time(row: dict) -> str:
    seconds = row["median_seconds"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _memory(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a file that pytest benchmarks --results wrote")
    parser.add_argument("suite", help="integrations, magnet, ...")
    arguments = parser.parse_args()
    print(table(json.loads(arguments.source.read_text()), arguments.suite))


if __name__ == "__main__":
    main()
