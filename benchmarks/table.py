"""Print a suite of a results file as a Markdown table: python -m benchmarks.table benchmarks/results/FILE.json SUITE

`--compiled` compares ours with torch.compile instead of the baseline with the fastest other path.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path


def table(results: dict, suite: str) -> str:
    """A line a group: the baseline's median, the fastest other path's, their ratio, and the memory of both."""
    lines = _head(results["machine"], "| | before | after | ratio | peak memory before | after |")
    for group, paths in _groups(results, suite):
        before = paths.pop(next(iter(paths.values()))["baseline"], None)
        if before is None or not paths:
            continue
        after = min(paths.values(), key=lambda row: row["median_seconds"])
        ratio = before["median_seconds"] / after["median_seconds"]
        lines.append(
            f"| {group} | {_time(before)} | {_time(after)} | **{ratio:.2f}×** | {_memory(before)} | {_memory(after)} |"
        )
    return "\n".join(lines)


def compiled_table(results: dict, suite: str) -> str:
    """A line a group that has both: medians of the baseline, of torch.compile and of ours, and how ours compares."""
    lines = _head(results["machine"], "| | plain | torch.compile | ours | ours against plain | against torch.compile |")
    for group, paths in _groups(results, suite):
        if not {"plain", "torch.compile", "cpu"} <= paths.keys():
            continue
        rows = [paths[name] for name in ("plain", "torch.compile", "cpu")]
        first, second = (row["median_seconds"] / rows[2]["median_seconds"] for row in rows[:2])
        lines.append(f"| {group} | {' | '.join(map(_time, rows))} | {first:.2f}× | **{second:.2f}×** |")
    return "\n".join(lines)


def _head(machine: dict, columns: str) -> list[str]:
    where = f"{machine['processor']}, {machine['cores']} cores ({machine['cpu_capability']})"
    return [
        f"{where}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}",
        "",
        columns,
        "|---|---|---|---|---|---|",
    ]


def _groups(results: dict, suite: str) -> Iterator[tuple[str, dict[str, dict]]]:
    """Each group of the suite with its rows by path."""
    rows = [row for row in results["rows"] if row["suite"] == suite]
    for group, members in groupby(rows, key=lambda row: row["group"]):
        yield group, {row["path"]: row for row in members}


def _time(row: dict) -> str:
    seconds = row["median_seconds"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _memory(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a file that pytest benchmarks --results wrote")
    parser.add_argument("suite", help="integrations, magnet, ...")
    parser.add_argument("--compiled", action="store_true", help="ours against torch.compile")
    arguments = parser.parse_args()
    write = compiled_table if arguments.compiled else table
    print(write(json.loads(arguments.source.read_text()), arguments.suite))


if __name__ == "__main__":
    main()
