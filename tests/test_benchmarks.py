"""What the benchmarks report: rows, ratios and shares of the ceilings, and the picture of them. Nothing is timed."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import conftest, machine, peak, plot, summary

BEST = {"copy": 10e9, "float32": 100e9, "bfloat16": 200e9}


def bench(path: str, median: float, **info) -> SimpleNamespace:
    return SimpleNamespace(
        fullname="benchmarks/bench_magnet.py::test_inference[x]",
        extra_info={"path": path, "baseline": "plain", **info},
        stats=SimpleNamespace(median=median, min=median / 2, rounds=3),
    )


def test_rows_hold_ratios_and_shares() -> None:
    members = [bench("plain", 2.0), bench("cpu", 0.5, flops=25e9, bytes=1e9, dtype="bfloat16", peak_bytes=1 << 20)]
    plain, ours = conftest._rows("group", members, BEST)
    assert (plain["ratio"], ours["ratio"], ours["suite"]) == (1.0, 4.0, "magnet")
    assert ours["product_share"] == pytest.approx(0.25) and ours["copy_share"] == pytest.approx(0.2)
    assert "copy_share" not in plain
    line = conftest._line(ours)
    assert "4.00x" in line and "20 % of copy" in line and "25 % of product" in line and "peak 1 MiB" in line
    assert plot.nearest_ceiling(ours) == ("product", pytest.approx(0.25)) and plot.nearest_ceiling(plain) is None
    alone = conftest._rows("group", members[1:], BEST)[0]
    assert alone["ratio"] is None and "x" not in conftest._line(alone).split("ms")[1]
    json.dumps(alone, allow_nan=False)


def test_picture_of_results(tmp_path, monkeypatch) -> None:
    rows = conftest._rows("one", [bench("plain", 2.0), bench("cpu", 0.5, flops=25e9)], BEST)
    rows += conftest._rows("two", [bench("cpu", 0.5)], BEST)
    source, target = tmp_path / "results.json", tmp_path / "new" / "picture.png"
    source.write_text(json.dumps({"machine": machine.description(), "ceilings": BEST, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["plot", str(source), str(target)])
    plot.main()
    with Image.open(target) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x9A, 0xA5, 0xB1), (0x28, 0x78, 0xC8), (0xC0, 0x30, 0x30)} <= colours  # two bars and a ceiling's line


def test_peak_memory_is_what_a_call_needs() -> None:
    needed = machine.peak_bytes(lambda: torch.ones(16 << 20).sum())
    assert needed == 0 or (60 << 20) < needed < (200 << 20)  # 64 MiB; 0 where the system does not tell


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_peak_is_found() -> None:
    found = peak.float32_peak(1)
    assert found is not None and 1e8 < found < 1e14


@pytest.mark.parametrize("option", [None, "--compile", "--full"])
def test_compiled_rows_run_when_asked_for(option: str | None) -> None:
    added: dict[str, list] = {"torch.compile": [], "cpu": []}
    items = [
        SimpleNamespace(callspec=SimpleNamespace(params={"path": path, "side": 30}), add_marker=markers.append)
        for path, markers in added.items()
    ]
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: name == option), items)
    assert [len(markers) for markers in added.values()] == [int(option != "--compile"), 0]


def test_results_are_written_while_the_run_goes_on(tmp_path) -> None:
    target = tmp_path / "new" / "results.json"
    measured = [bench("plain", 2.0), bench("cpu", 0.5)]
    for member in measured:
        member.group, member.stats.data = "group", [1.0]
    session = SimpleNamespace(benchmarks=[])
    config = SimpleNamespace(getoption=lambda name: target, _benchmarksession=session, _ceilings=BEST)

    def end_of_test() -> None:
        hook = conftest.pytest_runtest_teardown(SimpleNamespace(config=config))
        next(hook)
        assert next(hook, "ended") == "ended"

    end_of_test()
    assert not target.exists()  # nothing was measured yet
    for last_written, rows in ((-math.inf, 1), (time.monotonic(), 1), (-math.inf, 3)):  # at most once a minute
        session.benchmarks.append(measured[len(session.benchmarks) % 2])
        config._results_written = last_written
        end_of_test()
        assert len(json.loads(target.read_text())["rows"]) == rows
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]


def test_a_large_suite_is_kept_as_spreads() -> None:
    rows = []
    for shape in range(summary.MOST_GROUPS + 1):
        members = [bench("plain", 2.0), bench("cpu", 2.0 / (shape + 1), bytes=8)]
        for name in ("float32, forward", "float32, forward+backward"):
            rows += conftest._rows(f"attention, {shape}, {name}", members, BEST)
    few = [{**row, "suite": "few"} for row in conftest._rows("one", [bench("plain", 1.23456)], BEST)]
    kept = json.loads(summary.text(summary.summarised({"machine": {"date": "today"}, "rows": [*rows, *few]})))
    assert [(row["suite"], row["median_seconds"]) for row in kept["rows"]] == [("few", 1.235)]
    assert [(row["of"], row["path"]) for row in kept["spreads"]] == [
        (of, path) for of in ("float32, forward", "float32, forward+backward") for path in ("plain", "cpu")
    ]
    ours = kept["spreads"][1]
    assert ours["shapes"] == 61 and ours["ratio"] == [1.0, 31.0, 61.0] and ours["rounds"] == [3, 3]
    assert ours["median_seconds"] == [0.03279, 0.06452, 2.0] and kept["machine"] == {"date": "today"}
