"""Our best against the best rival, whole models: the record, and whether new results fall behind it.

    python -m benchmarks.record                  # the table of benchmarks/results/record.json
    python -m benchmarks.record write FILE...    # makes that file of results files
    python -m benchmarks.record check FILE       # new results: status 1 where one falls behind by more than a tenth

A ratio is how many times as fast our fastest way is as the fastest rival, in the same run and precision. Results of
another processor are compared with that processor's entries alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import COMPILED, PACKED
from benchmarks.rivals import ONNX_RUNTIME, OPENVINO, OPENVINO_INT8
from benchmarks.summary import rounded, text

RECORD = Path(__file__).parent / "results" / "record.json"
BEHIND = 0.9
"""Of the recorded ratio: less is a failure."""

_OURS = (PACKED, "cpu", COMPILED, "cpu, int8")
_RIVALS = ("torch.compile", OPENVINO, ONNX_RUNTIME, OPENVINO_INT8, "SDPA")


def entries(results: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """One for each group that has a way of ours and a rival.

    Args:
        results: as `pytest benchmarks --results` writes them.
        source: named in the entries.
    """
    found = []
    machine = results["machine"]
    for (suite, group), rows in groupby(results["rows"], key=lambda row: (row["suite"], row["group"])):
        paths = {row["path"]: row for row in rows}
        ours = _fastest(paths, _OURS)
        rival = _fastest(paths, _RIVALS)
        if ours is None or rival is None:
            continue
        entry = {
            "group": group,
            "suite": suite,
            "processor": f"{machine['processor']} ({machine['cpu_capability']})",
            "ours": ours["path"],
            "rival": rival["path"],
            "seconds": ours["median_seconds"],
            "rival_seconds": rival["median_seconds"],
            "ratio": rival["median_seconds"] / ours["median_seconds"],
            "date": machine["date"],
            "source": source,
        }
        entry |= {key: ours[key] for key in ("product_share", "peak_share") if key in ours}
        if ours.get("peak_bytes") and rival.get("peak_bytes"):
            entry["memory_ratio"] = ours["peak_bytes"] / rival["peak_bytes"]
        found.append(rounded(entry))
    return found


def behind(new: list[dict[str, Any]], record: list[dict[str, Any]]) -> list[str]:
    """A line for each entry whose ratio is less than `BEHIND` of the recorded one of the same processor."""
    known = {(entry["suite"], entry["group"], entry["processor"]): entry for entry in record}
    lines = []
    for entry in new:
        before = known.get((entry["suite"], entry["group"], entry["processor"]))
        if before is not None and entry["ratio"] < BEHIND * before["ratio"]:
            lines.append(f"{entry['group']}: {entry['ratio']:.2f} times {entry['rival']}, {before['ratio']:.2f} before")
    return lines


def table(record: list[dict[str, Any]]) -> str:
    """Markdown, a line an entry."""
    lines = [
        "| | processor | ours | the best rival | | of a large product | of the peak |",
        "|" + "---|" * 7,
    ]
    for entry in record:
        shares = [f"{100 * entry[key]:.0f} %" if key in entry else "–" for key in ("product_share", "peak_share")]
        times = [
            f"{entry['seconds']:.3g} s ({entry['ours']})",
            f"{entry['rival_seconds']:.3g} s ({entry['rival']})",
        ]
        cells = [entry["group"], entry["processor"], *times, f"**{entry['ratio']:.2f}×**", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fastest(paths: dict[str, dict], names: tuple[str, ...]) -> dict | None:
    return min((paths[name] for name in names if name in paths), key=lambda row: row["median_seconds"], default=None)


def _read(files: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine of the last file, and the entries of all."""
    contents = {file.name: json.loads(file.read_text()) for file in files}
    found = [entry for name, results in contents.items() for entry in entries(results, name)]
    return list(contents.values())[-1]["machine"], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("table", "write", "check"), default="table")
    parser.add_argument("files", nargs="*", type=Path, help="results files")
    arguments = parser.parse_args()
    if (arguments.task == "table") == bool(arguments.files):
        parser.error("files: expected for write and check, and for these alone")
    if arguments.task == "write":
        machine, found = _read(arguments.files)
        RECORD.write_text(text({"machine": machine, "rows": found}))
        return
    record = json.loads(RECORD.read_text())["rows"]
    if arguments.task == "table":
        print(table(record))
    elif lines := behind(_read(arguments.files)[1], record):
        sys.exit("\n".join(["behind the record:", *lines]))


if __name__ == "__main__":
    main()
