"""The GPU's benchmarks without one: a dry run in the interpreter, and what becomes of measured times."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_deformable_attention, gpu, gpu_cases, gpu_check, plot
from benchmarks.window_shapes import Shape, traffic

CASES = [*gpu_cases.TINY, gpu_cases.CrossModal("pixels only", "pyramid 6x6")]


def test_dry_run(tmp_path, capsys, monkeypatch):
    """Of the two quickest cases; `test_rivals_compute_the_same` runs every path of them all."""
    cases = gpu_cases.TINY[1:3]
    monkeypatch.setattr(gpu, "TINY", cases)
    target = tmp_path / "new" / "gpu.json"
    gpu.main(["--dry-run", "--results", str(target), "--picture", str(tmp_path / "picture.png")])
    results = json.loads(target.read_text())
    rows = results["rows"]
    assert [row.get("error") for row in rows] == [None] * 2 * 3 * len(cases)
    assert {row["path"] for row in rows} == {"reference", "SDPA", "triton"}
    assert {row["suite"] for row in rows} == {f"{case.operator}_gpu" for case in cases}
    assert all(row["median_seconds"] is None and row["bytes"] > 0 for row in rows)
    assert all(row.get("moved_bytes", row["bytes"]) >= row["bytes"] for row in rows)
    assert results["choices"] == []  # of calls on a CPU nothing is measured
    assert results["machine"]["triton"] and results["machine"]["driver"] is None
    assert not (tmp_path / "picture.png").exists() and "ran, not timed" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rivals_compute_the_same(case, monkeypatch):
    """In float32, every path's own code but torch.compile's; and the gradients of the same inputs."""
    monkeypatch.setattr(bench_deformable_attention, "HEADS", 2)  # the maps have no smaller form
    for backward in (False, True):
        paths = [path for path in case.paths if path not in ("torch.compile", "FlexAttention", "cuda")]
        ours, *rivals = (gpu.runner(path, case, 1, torch.float32, backward, "cpu", 1)(0) for path in reversed(paths))
        assert paths[-1] == "triton" and rivals
        for rival in rivals:
            for our, their in zip(ours, rival, strict=True):
                torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4)


def test_every_stage_is_a_case():
    titles = [f"{case.title}, {case}" for case in gpu_cases.CASES]
    assert len(set(titles)) == len(titles) and "cross-modal attention, shared, Swin-B stage 4" in titles
    for case in gpu_cases.CASES:
        forward, both = (case.floor(torch.bfloat16, backward, 16) for backward in (False, True))
        assert 0 < forward["bytes"] < both["bytes"] and 0 < forward["flops"] < both["flops"]
        assert case.floor(torch.bfloat16, False, 1)["bytes"] * 16 == forward["bytes"]
        assert case.moved(torch.bfloat16, True, 16) > forward["bytes"]
        assert case.baseline in case.paths and case.paths[-2:] == gpu_cases.OURS


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
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name)  # pybind11 may be absent
    build, _, memcheck, _, _, *slow = gpu_check.commands(*files)
    assert build[-2:] == ["build_ext", "--inplace"]
    assert [(command[0], command[4]) for command in (memcheck, *slow)] == [
        ("/bin/compute-sanitizer", tool) for tool in ("memcheck", "racecheck", "initcheck")
    ]


def test_what_does_not_fit_into_the_time_is_told():
    quick, bad, endless = (
        [sys.executable, "-S", "-c", code] for code in ("", "raise SystemExit(3)", "import time; time.sleep(600)")
    )
    assert gpu_check.run([quick, bad, quick], gpu_check.monotonic() + 600) == [" ".join(bad)]
    assert gpu_check.run([endless, quick], gpu_check.monotonic() + 0.2) == [
        f"{' '.join(endless)} (stopped: the time is over)",
        f"{' '.join(quick)} (not begun: the time is over)",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        gpu.main(["--results", str(tmp_path / "gpu.json")])
