"""The GPU's benchmarks without one: a dry run in the interpreter, and what becomes of measured times."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_check, plot
from benchmarks.window_shapes import Shape, traffic


def test_dry_run(tmp_path, capsys):
    target = tmp_path / "new" / "gpu.json"
    gpu.main(["--dry-run", "--results", str(target), "--picture", str(tmp_path / "picture.png")])
    results = json.loads(target.read_text())
    assert [row.get("error") for row in results["rows"]] == [None] * 6
    assert {row["path"] for row in results["rows"]} == {"reference", "SDPA", "triton"}
    assert all(row["median_seconds"] is None and row["bytes"] > 0 for row in results["rows"])
    assert results["machine"]["triton"] and results["machine"]["driver"] is None
    assert not (tmp_path / "picture.png").exists() and "ran, not timed" in capsys.readouterr().out


def test_rivals_compute_the_same():
    shape = Shape("Swin-T", 30, 1, 7, True)  # 8 x 8 tokens: shifted and padded
    ours, *rivals = (
        gpu.runner(path, shape, 1, torch.bfloat16, False, "cpu", 1)(0) for path in ("triton", "reference", "SDPA")
    )
    for rival in rivals:
        torch.testing.assert_close(ours, rival, rtol=0.02, atol=0.02)


def test_counts():
    shape = Shape("Swin-B", 480, 1, 12, False)  # 120 x 120 tokens, 128 channels, no padding
    counts = traffic(shape, torch.bfloat16, False, 16)
    assert counts == {"bytes": 16 * 14400 * 128 * 4 * 2, "flops": 16 * 14400 * 144 * 128 * 4}
    assert traffic(shape, torch.bfloat16, True)["bytes"] == 14400 * 128 * 11 * 2


def test_ratios_and_picture():
    row = {"group": "g", "baseline": "torch.compile", "dtype": "bfloat16", "bytes": 1e9, "flops": 0, "suite": "s"}
    rows = [{**row, "path": path, "median_seconds": s} for path, s in (("torch.compile", 4e-3), ("triton", 1e-3))]
    rows.append({**row, "path": "SDPA", "median_seconds": None, "error": "OutOfMemoryError: no"})
    best = {"copy": 4e12, "float32": 1e12, "bfloat16": 1e12}
    base, ours, failed = gpu.with_ratios(rows, best)
    assert (base["ratio"], ours["ratio"], failed["ratio"]) == (1.0, 4.0, None)
    assert ours["copy_share"] == pytest.approx(0.25) and "25 % of copy" in gpu.line(ours)
    assert "OutOfMemoryError" in gpu.line(failed)
    machine = {**gpu.description(), "driver": "1.2", "gpu": "some GPU"}
    assert plot.draw({"machine": machine, "ceilings": best, "rows": [base, ours]}).width == plot.WIDTH


def test_commands(monkeypatch):
    files = Path("r.json"), Path("p.png"), Path("m.json")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    tests, benchmarks, models = gpu_check.commands(*files)
    assert tests[-1] == "tests/gpu" and benchmarks[0] == sys.executable and "r.json" in benchmarks
    assert "benchmarks.gpu_models" in models and "m.json" in models
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/compute-sanitizer")
    assert gpu_check.commands(*files)[1][0] == "/bin/compute-sanitizer"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        gpu.main(["--results", str(tmp_path / "gpu.json")])
