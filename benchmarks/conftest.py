"""Shared by all benchmarks: a ratio table at the end of the run, and `--results FILE` to keep it with its machine.

A benchmark belongs to a group and says in `extra_info["path"]` which implementation it timed; within a group
the ratios are to the path that `extra_info["baseline"]` names.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import magnet_fast
from magnet_fast import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write medians and ratios to this JSON file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = {}
    for bench in getattr(session, "benchmarks", []):
        if bench.stats.data:
            groups.setdefault(bench.group, []).append(bench)
    if not groups:
        return
    rows = [row for name, members in groups.items() for row in _rows(name, members)]
    terminalreporter.section("ratios (baseline time / time, medians)")
    for row in rows:
        terminalreporter.write_line(
            f"{row['group']:<52} {row['path']:<22} {1e3 * row['median_seconds']:10.2f} ms   {row['ratio']:5.2f}x"
        )
    if target := config.getoption("--results"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")
        terminalreporter.write_line(f"written to {target}")


def _rows(group: str, members: list[Any]) -> list[dict[str, Any]]:
    baseline = members[0].extra_info["baseline"]
    reference = next((m.stats.median for m in members if m.extra_info["path"] == baseline), float("nan"))
    return [
        {
            "group": group,
            "path": m.extra_info["path"],
            "baseline": baseline,
            "median_seconds": m.stats.median,
            "min_seconds": m.stats.min,
            "rounds": m.stats.rounds,
            "ratio": reference / m.stats.median,
        }
        for m in members
    ]


def _machine() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "magnet_fast": magnet_fast.__version__,
        "backends": list(ops.available_backends()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
