"""Whole models whose Linears compute in int8, every path of a case timed in turns.

"cpu, packed weights" after `accelerate(model, pack=True)`, "cpu, int8" after `accelerate(model, pack=True,
weights="int8")`; "OpenVINO", and "OpenVINO int8" after nncf's post-training quantisation by four images, where both are
installed (extra `bench`). `error` is the distance from the plain model's output by its norm.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_int8.py --full --results benchmarks/results/int8_cpu.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from benchmarks import PACKED
from benchmarks.bench_magnet import operations
from benchmarks.bench_systems import WORDS, Masks
from benchmarks.rivals import OPENVINO, OPENVINO_INT8, openvino
from benchmarks.turns import in_turns
from magnet_fast import models
from magnet_fast.ops import _int8

CALIBRATION = 4
INT8 = "cpu, int8"
SIDES = {"timm swin_tiny_patch4_window7_224": 224, "timm swin_base_patch4_window7_224": 224, "magnet_swin_b": 480}
QUICK = "timm swin_tiny_patch4_window7_224"


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if not name.startswith("timm "):
        return Masks(models.create(name))
    import timm

    return timm.create_model(name.removeprefix("timm "), pretrained=False)


def inputs_of(name: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, 3, SIDES[name], SIDES[name], generator=generator)
    if name.startswith("timm "):
        return (image,)
    ids = torch.randint(5, 1000, (1, WORDS), generator=generator)
    return image, ids, torch.ones(1, WORDS, dtype=torch.bool)


@pytest.mark.parametrize("name", SIDES)
def test_inference(name: str, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    if name != QUICK and not full:
        pytest.skip("--full")
    if not _int8.works():
        pytest.skip("no compiled extension, or no int8 product in PyTorch here")
    inputs = inputs_of(name, 0)
    first = model_of(name).eval().requires_grad_(False)
    packed, int8 = copy.deepcopy(first), copy.deepcopy(first)
    magnet_fast.accelerate(packed, pack=True)
    magnet_fast.accelerate(int8, pack=True, weights="int8")
    runs: dict[str, Callable[[], Any]] = {
        PACKED: lambda: torch.no_grad()(packed)(*inputs),
        INT8: lambda: torch.no_grad()(int8)(*inputs),
    }
    if (rival := openvino(first, inputs)) is not None:
        runs[OPENVINO] = rival
    samples = [inputs_of(name, seed) for seed in range(1, 1 + CALIBRATION)]
    if (rival := openvino(first, inputs, samples)) is not None:
        runs[OPENVINO_INT8] = rival
    with torch.no_grad():
        truth = first(*inputs)
    errors = {path: float((run() - truth).norm() / truth.norm()) for path, run in runs.items()}
    assert errors[PACKED] < 1e-3 and errors[INT8] < 0.3, errors
    weights = sum(p.numel() * p.element_size() for p in first.parameters())
    flops = operations(lambda: packed(*inputs))
    rounds = 5 if full else 15
    rows = in_turns(runs, PACKED, rounds, request.config._ceilings, dtype="float32", flops=flops, bytes=weights)
    group = f"{name} {SIDES[name]}x{SIDES[name]}, inference, batch 1, int8"
    request.config._turns += [{"suite": "int8", "group": group, "error": errors[row["path"]], **row} for row in rows]
