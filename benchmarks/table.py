"""Print a suite of a results file as a Markdown table: python -m benchmarks.table benchmarks/results/FILE.json SUITE

`--compiled` compares ours with torch.compile instead of the baseline with the fastest other path; `--rivals` with every
rival that was measured, in suites that time their paths in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from benchmarks import COMPILED, PACKED

_BOTH = ("torch.compile", "cpu")
_OURS, _RIVALS = (PACKED, "cpu", COMPILED), ("torch.compile", "OpenVINO", "ONNX Runtime")


def table(results: dict, suite: str) -> str:
    """A line a group: medians of the baseline and the fastest other path, and the memory of both.

    Where a suite has rows of packed weights, they have columns of their own.
    """
    groups = list(_groups(results, suite))
    any_packed = any(PACKED in paths for _, paths in groups)
    columns = "| | before | after | ratio |" + (" packed weights | ratio |" if any_packed else "")
    lines = _head(results["machine"], columns + " peak memory before | after |" + (" packed |" if any_packed else ""))
    for group, paths in groups:
        packed = paths.pop(PACKED, None)
        before = paths.pop(next(iter(paths.values()))["baseline"], None) if paths else None
        if before is None or not paths:
            continue
        after = min(paths.values(), key=lambda row: row["median_seconds"])
        cells = [group, _time(before), _time(after), _ratio(before, after)]
        cells += [_time(packed), _ratio(before, packed)] if packed else ["–", "–"] if any_packed else []
        cells += [_memory(before), _memory(after), *([_memory(packed)] if any_packed else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compiled_table(results: dict, suite: str) -> str:
    """A line a group that has both: medians of the baseline, of torch.compile and of ours, and how ours compares.

    Where ours was compiled as well, it has a column of its own.
    """
    groups = [(group, paths) for group, paths in _groups(results, suite) if {"plain", *_BOTH} <= paths.keys()]
    both = any(COMPILED in paths for _, paths in groups)
    columns = "| | plain | torch.compile | ours | ours against plain | against torch.compile |"
    lines = _head(results["machine"], columns + (" ours, compiled |" if both else ""))
    for group, paths in groups:
        rows = [paths[name] for name in ("plain", *_BOTH)]
        first, second = (row["median_seconds"] / rows[2]["median_seconds"] for row in rows[:2])
        cells = [group, *map(_time, rows), f"{first:.2f}×", f"**{second:.2f}×**"]
        cells += [_time(paths[COMPILED]) if COMPILED in paths else "–"] if both else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rivals_table(results: dict, suite: str) -> str:
    """A line a group: medians and memory of the baseline and of the fastest of ours, those of every rival, and how many
    times as fast ours is as the baseline and as the fastest rival."""
    columns = (
        f"| | plain | ours | {' | '.join(_RIVALS)} | against plain | against the best rival | share of the ceiling "
        "| memory, plain | ours |"
    )
    lines = _head(results["machine"], columns)
    for group, paths in _groups(results, suite):
        plain = paths["plain"]
        ours = min((paths[name] for name in _OURS if name in paths), key=lambda row: row["median_seconds"])
        rivals = [paths[name] for name in _RIVALS if name in paths]
        best = max((row["ratio"] for row in rivals), default=None)
        shares = [ours[key] for key in ("product_share", "copy_share") if key in ours]
        cells = [
            group,
            _time(plain),
            _time(ours),
            *(_time(paths[name]) if name in paths else "–" for name in _RIVALS),
            f"**{ours['ratio']:.2f}×**",
            f"{ours['ratio'] / best:.2f}×" if best else "–",
            f"{100 * max(shares):.0f} %" if shares else "–",
            _memory(plain),
            _memory(ours),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(machine: dict, columns: str) -> list[str]:
    where = f"{machine['processor']}, {machine['cores']} cores ({machine['cpu_capability']})"
    return [
        f"{where}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}",
        "",
        columns,
        "|" + "---|" * (columns.count("|") - 1),
    ]


def _groups(results: dict, suite: str) -> Iterator[tuple[str, dict[str, dict]]]:
    """Each group of the suite with its rows by path."""
    rows = [row for row in results["rows"] if row["suite"] == suite]
    for group, members in groupby(rows, key=lambda row: row["group"]):
        yield group, {row["path"]: row for row in members}


def _time(row: dict) -> str:
    seconds = row["median_seconds"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _ratio(before: dict, after: dict) -> str:
    return f"**{before['median_seconds'] / after['median_seconds']:.2f}×**"


def _memory(row: dict | None) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f} MiB" if row and row.get("peak_bytes") else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a file that pytest benchmarks --results wrote")
    parser.add_argument("suite", help="integrations, magnet, ...")
    parser.add_argument("--compiled", action="store_true", help="ours against torch.compile")
    parser.add_argument("--rivals", action="store_true", help="ours against every rival")
    arguments = parser.parse_args()
    write = rivals_table if arguments.rivals else compiled_table if arguments.compiled else table
    print(write(json.loads(arguments.source.read_text()), arguments.suite))


if __name__ == "__main__":
    main()
