"""The kernels compile for GPUs that are not here and take no more than they have; so says the committed summary."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from magnet_fast.kernels import report  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "triton_kernels.json"


def program(**changes) -> report.Program:
    given = {"registers": 128, "spills": 0, "shared": 20 << 10, "warps": 4, "stages": 1, "arch": 90, "tiles": ""}
    return report.Program(**{"operator": "o", "kernel": "k", "cases": ("c",), "dtype": "bfloat16", **given, **changes})


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(RESULTS.read_text())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("window_attention.", {"forward_kernel", "backward_kernel"}),
        ("relative_attention.statistics", {"statistics_kernel"}),  # the others take longer to compile
    ],
)
def test_kernels_fit(name, kernels, arch):
    found = list(report.programs(quick=True, kernel=name, archs=[arch], dtypes=[torch.bfloat16]))
    assert {p.kernel for p in found} >= kernels
    assert [p for p in found if not p.fits] == []
    assert all(0 < p.registers <= 255 and p.occupancy >= 0.1 for p in found)


def test_processes_find_the_same():
    wanted = {"quick": True, "kernel": "_list_kernel", "archs": [80, 90], "dtypes": [torch.float32]}
    assert list(report.programs(**wanted, jobs=2)) == list(report.programs(**wanted))


def test_the_committed_programs_fit(committed):
    assert committed["do_not_fit"] == 0 and committed["archs"] == [80, 90]
    for row in committed["rows"]:
        assert all(0 < most <= 255 for registers in row["registers"].values() for most in registers)
        assert 0 < row["occupancy"] <= 1 and row["shared"] <= report.SHARED_LIMIT[80]
    assert committed["triton"] and committed["ptxas"]


def test_the_committed_programs_are_those_of_today(committed):
    """Every launch with every configuration, of each dtype, and nothing else."""
    dtypes = [
        dtype for dtype in report.DTYPES if any(report._name(dtype) in row["registers"] for row in committed["rows"])
    ]
    assert {torch.bfloat16, torch.float32} <= set(dtypes)
    requests = report.requests(False, "", [90], dtypes)
    today = Counter(
        (report._name(request.dtype), request.operator, request.launch.kernel.__name__.strip("_"), case)
        for request in requests
        for case in request.cases
    )
    found = {
        (dtype, row["operator"], row["kernel"], row["case"]): number
        for row in committed["rows"]
        for dtype, number in row["configurations"].items()
    }
    assert found == today and committed["programs"] == len(committed["archs"]) * len(requests)


def test_every_kernel_is_committed(committed):
    written = set()
    for path in (ROOT / "kernels").glob("*.py"):
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        written |= {node.name.strip("_") for node in functions if node.name.endswith("_kernel")}
    assert {row["kernel"] for row in committed["rows"]} == written


def test_the_committed_programs_are_of_these_sources(committed):
    command = "python -m magnet_fast.kernels.report --results benchmarks/results/triton_kernels.json"
    assert committed["sources"] == report.sources(), f"kernels have changed: {command}, then docs/kernels.md"


def test_the_document_says_what_was_committed(committed):
    document = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    versions = ", ".join(f"{version} for {arch}" for arch, version in committed["ptxas"].items())
    assert f"Triton {committed['triton']}, ptxas {versions}, {committed['date']}" in document
    assert f"Of {committed['programs']} distinct programs, {committed['do_not_fit']} spill" in document
    assert report.text(committed) == RESULTS.read_text()


def test_occupancy():
    assert program().occupancy == 16 / 64  # 65536 registers / (128 * 128)
    assert program(registers=32).occupancy == 10 * 4 / 64  # 228 KB / 21 KB
    assert program(registers=32, shared=0).occupancy == 1.0


def test_what_does_not_fit():
    assert program().fits
    assert not program(spills=1).fits
    assert program(shared=200 << 10).fits and not program(shared=200 << 10, arch=80).fits


def test_the_table_has_the_worst_of_each_case():
    programs = [
        program(arch=80, registers=100),
        program(registers=200, warps=8),
        program(registers=90, shared=40 << 10),
        program(dtype="float32", spills=3),
    ]
    text = report.markdown(report.results(programs))
    assert "Of 4 distinct programs" in text and "1 spill" in text
    assert "| k | c | 100 / 200 | 128 | 40.0 | 12 % |" in text
