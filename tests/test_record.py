"""The record of ours against the best rival. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record

MACHINE = {"processor": "CPU", "cpu_capability": "AVX2", "date": "2026-11-30", "torch": "2.15"}


def results(ours: float, rival: float = 1.0, **machine: str) -> dict:
    rows = [("plain", 3.0), ("cpu", ours + 0.2), ("cpu, packed weights", ours), ("OpenVINO", rival), ("SDPA", 2.0)]
    common = {"suite": "systems", "peak_bytes": 4 << 20, "product_share": 0.5}
    lone = {"suite": "systems", "group": "no rival", "path": "cpu", "median_seconds": 1.0}
    named = [{**common, "group": "Swin", "path": path, "median_seconds": seconds} for path, seconds in rows]
    return {"machine": {**MACHINE, **machine}, "rows": [*named, lone]}


def test_the_fastest_of_each_side_is_compared() -> None:
    (entry,) = record.entries(results(0.5), "file.json")
    assert (entry["ours"], entry["rival"], entry["ratio"]) == ("cpu, packed weights", "OpenVINO", 2.0)
    assert entry["memory_ratio"] == 1.0 and entry["processor"] == "CPU (AVX2)" and entry["source"] == "file.json"
    line = record.table([entry]).splitlines()[-1]
    assert line.startswith(
        "| Swin | CPU (AVX2) | 0.5 s (cpu, packed weights) | 1 s (OpenVINO) | **2.00×** | 50 % | – |"
    )


@pytest.mark.parametrize(("seconds", "lines"), [(0.5, 0), (0.54, 0), (0.57, 1), (0.4, 0)])
def test_a_tenth_less_is_behind(seconds: float, lines: int) -> None:
    known = record.entries(results(0.5), "old")
    assert len(record.behind(record.entries(results(seconds), "new"), known)) == lines


def test_another_processor_is_not_compared() -> None:
    known = record.entries(results(0.5), "old")
    assert record.behind(record.entries(results(2.0, processor="another"), "new"), known) == []


def test_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(record, "RECORD", tmp_path / "record.json")
    for name, seconds in (("old", 0.5), ("new", 0.9)):
        (tmp_path / name).write_text(json.dumps(results(seconds)))

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["record", *arguments])
        record.main()

    run("write", str(tmp_path / "old"))
    run()
    assert "**2.00×**" in capsys.readouterr().out
    run("check", str(tmp_path / "old"))
    with pytest.raises(SystemExit, match="Swin: 1.11 times OpenVINO, 2.00 before"):
        run("check", str(tmp_path / "new"))


def test_the_committed_record_holds_what_its_sources_hold() -> None:
    rows = json.loads(record.RECORD.read_text())["rows"]
    for source in {row["source"] for row in rows}:
        found = record.entries(json.loads((record.RECORD.parent / source).read_text()), source)
        assert [row for row in rows if row["source"] == source] == found
