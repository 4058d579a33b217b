"""Whole models in inference under autocast to bfloat16, as they are and with packed weights.

PyTorch casts every weight in every call where there are no gradients. A packed weight has a copy in bfloat16 beside it,
and a model brought to bfloat16 as a whole has nothing to cast.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_autocast.py --full --results benchmarks/results/autocast_cpu.json

Without `--full`: MagNet tiny. Only on a processor that multiplies bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import magnet_fast
from benchmarks import PACKED
from benchmarks.bench_systems import CASES, IDS, Case, Masks, as_published, inputs_of, model_of
from benchmarks.turns import in_turns
from benchmarks.whole import only_if_wanted

WHOLE = "bfloat16 as a whole, packed weights"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_inference(case: Case, request: pytest.FixtureRequest) -> None:
    only_if_wanted(request, case.preset == "magnet_tiny", torch.bfloat16)
    image, ids, mask = inputs_of(case)
    model = Masks(copy.deepcopy(model_of(case.preset))).requires_grad_(False)
    packed, whole = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    for accelerated in (packed, whole):
        magnet_fast.accelerate(accelerated, pack=True)

    def cast(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(image, ids, mask)

        return run

    def published() -> torch.Tensor:
        with as_published():
            return cast(model)()

    runs = {"plain": published, PACKED: cast(packed), WHOLE: lambda: whole(image.bfloat16(), ids, mask)}
    with torch.no_grad():
        rows = in_turns(runs, "plain", 15 if case.quick else 5, request.config._ceilings, dtype="bfloat16")
    group = f"{case.title}, batch 1, inference, autocast to bfloat16"
    request.config._turns += [{"suite": "autocast", "group": group, **row} for row in rows]
