"""Shared by all benchmarks: `--full`, the machine's ceilings, a table at the end, and `--results FILE` to keep it.

A benchmark belongs to a group and says in `extra_info["path"]` which implementation it timed; within a group the ratios
are to the path that `extra_info["baseline"]` names. It may add "bytes" and "flops" (compulsory traffic and operations
of one run), "dtype" and "peak_bytes": the table then shows its share of the ceilings; "items" makes it items a second.

The file is a summary (`summary.py`), and is written once a minute, too, so that a run of hours that is stopped has kept
what it measured.

`--full` takes every shape (`full` is the fixture). A row of path "torch.compile" needs `--compile`; with both, every
shape is compiled, which takes hours.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, summary

_SECONDS_BETWEEN_WRITES = 60
_KEPT = ("bytes", "flops", "dtype", "peak_bytes", "items")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write medians, ratios and shares to this JSON file")
    parser.addoption("--full", action="store_true", help="all shapes")
    parser.addoption("--compile", action="store_true", help="torch.compile, too (minutes a model)")
    parser.addoption("--onnx", action="store_true", help="ONNX Runtime, too: whole models, float32 (minutes a model)")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all shapes are wanted."""
    return request.config.getoption("--full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rows that compile run when asked for: a compilation on a CPU takes long."""
    if config.getoption("--compile"):
        return
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and any("torch.compile" in str(value) for value in callspec.params.values()):
            item.add_marker(pytest.mark.skip(reason="compiles: --compile"))


@pytest.fixture(scope="session", autouse=True)
def ceilings(request: pytest.FixtureRequest) -> dict[str, float]:
    """The machine's ceilings, measured once before the first benchmark."""
    request.config._ceilings = machine.ceilings()
    return request.config._ceilings


def pytest_configure(config: pytest.Config) -> None:
    config._turns = []  # rows of the suites that time their paths in turns


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    config, now = item.config, time.monotonic()
    due = now > getattr(config, "_results_written", -math.inf) + _SECONDS_BETWEEN_WRITES
    if config.getoption("--results") and due and (rows := _measured(config)):
        _write(config, rows)
        config._results_written = now


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = _measured(config)
    if not rows:
        return
    best = config._ceilings
    terminalreporter.section("ratios (baseline time / time, medians) and shares of the ceilings")
    terminalreporter.write_line(
        f"ceilings: copy {best['copy'] / 1e9:.1f} GB/s (read + written), matrix product "
        f"{best['float32'] / 1e9:.0f} GFLOP/s float32, {best['bfloat16'] / 1e9:.0f} bfloat16"
    )
    for row in rows:
        terminalreporter.write_line(_line(row))
    if target := config.getoption("--results"):
        _write(config, rows)
        terminalreporter.write_line(f"written to {target}")


def _measured(config: pytest.Config) -> list[dict[str, Any]]:
    """The rows of all benchmarks that ran so far, group by group."""
    groups: dict[str, list[Any]] = {}
    for bench in getattr(getattr(config, "_benchmarksession", None), "benchmarks", []):
        if bench.stats.data:
            groups.setdefault(bench.group, []).append(bench)
    rows = [row for name, members in groups.items() for row in _rows(name, members, config._ceilings)]
    return rows + getattr(config, "_turns", [])


def _write(config: pytest.Config, rows: list[dict[str, Any]]) -> None:
    target = config.getoption("--results")
    target.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine.description(), "ceilings": config._ceilings, "rows": rows}
    temporary = target.with_name(f"{target.name}.part")
    temporary.write_text(summary.text(summary.summarised(results)))
    os.replace(temporary, target)


def _rows(group: str, members: list[Any], best: dict[str, float]) -> list[dict[str, Any]]:
    baseline = members[0].extra_info["baseline"]
    reference = next((m.stats.median for m in members if m.extra_info["path"] == baseline), None)
    return [
        {
            "suite": Path(m.fullname.split("::")[0]).stem.removeprefix("bench_"),
            "group": group,
            "path": m.extra_info["path"],
            "baseline": baseline,
            "median_seconds": m.stats.median,
            "min_seconds": m.stats.min,
            "rounds": m.stats.rounds,
            "ratio": reference and reference / m.stats.median,  # None where the baseline was not run
            **{key: m.extra_info[key] for key in _KEPT if key in m.extra_info},
            **machine.shares(m.extra_info, m.stats.median, best),
        }
        for m in members
    ]


def _line(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:6.2f}x" if row["ratio"] else "      -"
    text = f"{row['group']:<56} {row['path']:<22} {1e3 * row['median_seconds']:10.2f} ms   {ratio}"
    for key, what in (("copy_share", "copy"), ("product_share", "product")):
        if key in row:
            text += f"   {100 * row[key]:4.0f} % of {what}"
    if row.get("items"):
        text += f"   {row['items'] / row['median_seconds']:.1f} a second"
    if row.get("peak_bytes"):
        text += f"   peak {row['peak_bytes'] / 2**20:.0f} MiB"
    return text
