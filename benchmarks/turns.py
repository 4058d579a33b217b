"""Paths timed in turns: what disturbs a shared machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import machine


def in_turns(
    runs: Mapping[str, Callable[[], Any]], baseline: str, rounds: int, best: dict[str, float], **info: Any
) -> list[dict[str, Any]]:
    """A row for each path, as the other suites have them.

    Args:
        runs: by path; each does the same work. One call of each, not timed, comes first.
        baseline: the path whose time is divided by the others'.
        rounds: each calls every path once.
        best: ceilings of the machine.
        info: "bytes", "flops" and "dtype" of a run, for its shares of the ceilings.

    Returns:
        Dicts with `path`, medians of the wall times and of the process's CPU times (all threads), peak memory, and
        `ratio`: the median over rounds of the baseline's time by the path's in the same round.
    """
    wall: dict[str, list[float]] = {path: [] for path in runs}
    processor: dict[str, list[float]] = {path: [] for path in runs}
    peaks = {}
    for path, run in runs.items():
        run()
        peaks[path] = machine.peak_bytes(run)
    for _ in range(rounds):
        for path, run in runs.items():
            started, busy = time.perf_counter(), time.process_time()
            run()
            processor[path].append(time.process_time() - busy)
            wall[path].append(time.perf_counter() - started)
    return [
        {
            "path": path,
            "baseline": baseline,
            "median_seconds": statistics.median(wall[path]),
            "min_seconds": min(wall[path]),
            "cpu_seconds": statistics.median(processor[path]),
            "rounds": rounds,
            "ratio": statistics.median(b / p for b, p in zip(wall[baseline], wall[path], strict=True)),
            **info,
            "peak_bytes": peaks[path],
            **machine.shares(info, statistics.median(wall[path]), best),
        }
        for path in runs
    ]
