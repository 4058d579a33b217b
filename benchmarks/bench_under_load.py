"""Operators and whole models beside ten busy processes: whether any suffers more than plain PyTorch does.

Every group is timed in turns twice, undisturbed and beside the others, which loop; "slowdown" in its rows says how many
times as long a path took beside them as without. Waiting threads sleep (`OMP_WAIT_POLICY=passive`), as the command line
has it, unless the environment says otherwise:

    export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
    pytest benchmarks/bench_under_load.py --full --results benchmarks/results/under_load_cpu.json

Without `--full`: the operators and MagNet tiny. With it: two models of full size as well.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import magnet_fast
from benchmarks import PACKED, bench_cross_modal_attention, bench_deformable_attention, bench_pixel_contrastive_loss
from benchmarks import bench_window_attention as windows
from benchmarks.bench_systems import CASES, Masks, as_published, inputs_of, model_of
from benchmarks.rivals import OPENVINO, openvino
from benchmarks.turns import in_turns
from benchmarks.whole import only_if_wanted
from benchmarks.window_shapes import Shape

OTHERS = 10
ROUNDS = 9

Run = Callable[[], Any]
OPERATORS: dict[str, Callable[[str], Run]] = {
    "window attention, Swin-B stage 3": lambda path: windows.runner(
        path, Shape("Swin-B", 480, 3, 12, True), torch.float32, False
    ),
    "cross-modal attention, Swin-B stage 1": lambda path: bench_cross_modal_attention.runner(
        path, "pixels only", "Swin-B stage 1", torch.float32, False
    ),
    "deformable attention, tiny model": lambda path: bench_deformable_attention.runner(
        path, "tiny model, 128x128", torch.float32, False
    ),
    "pixel contrastive loss, 30x30": lambda path: bench_pixel_contrastive_loss.runner(path, 30, torch.float32, True),
}
MODELS = {"magnet_tiny": True, "lavt_swin_b": False, "cris_r50": False}
"""Whether a preset is measured without --full."""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """That many processes that want a core each, all the time."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
        for other in others:
            other.wait()


def record(request: pytest.FixtureRequest, title: str, runs: Mapping[str, Run]) -> None:
    """Rows of a group, undisturbed and beside the others."""
    ceilings = request.config._ceilings
    with torch.no_grad() if "loss" not in title else torch.enable_grad():
        quiet = in_turns(runs, "plain", ROUNDS, ceilings, dtype="float32")
        with busy(OTHERS):
            beside = in_turns(runs, "plain", ROUNDS, ceilings, dtype="float32")
    for before, after in zip(quiet, beside, strict=True):
        after["slowdown"] = after["median_seconds"] / before["median_seconds"]
    for rows, where in ((quiet, "undisturbed"), (beside, f"beside {OTHERS} busy processes")):
        request.config._turns += [{"suite": "under load", "group": f"{title}, {where}", **row} for row in rows]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, request: pytest.FixtureRequest) -> None:
    record(request, name, {path: OPERATORS[name](path) for path in ("plain", "cpu")})


@pytest.mark.parametrize("preset", MODELS)
def test_model(preset: str, request: pytest.FixtureRequest) -> None:
    only_if_wanted(request, MODELS[preset])
    case = next(case for case in CASES if case.preset == preset)
    inputs = inputs_of(case)
    first = Masks(copy.deepcopy(model_of(preset))).requires_grad_(False)
    packed = copy.deepcopy(first)
    magnet_fast.accelerate(packed, pack=True)

    def published() -> torch.Tensor:
        with as_published():
            return first(*inputs)

    runs: dict[str, Run] = {"plain": published, PACKED: lambda: packed(*inputs)}
    if (rival := openvino(copy.deepcopy(first), inputs)) is not None:
        runs[OPENVINO] = rival
    record(request, f"{case.title}, batch 1, inference, float32", runs)
