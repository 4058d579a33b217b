"""RefSegformer, ReLA and CRIS as whole models, every path of a case timed in turns.

"plain" is the model as it is built, with roll, pad, partition, mask and softmax (`plain`) and the reference operators;
"cpu" after `accelerate(model)`; "cpu, packed weights" after `accelerate(model, pack=True)`. The rivals have the plain
model: "torch.compile" (with `--compile`), and "OpenVINO" where it is installed (extra `bench`), which takes the
exported graph and runs it in the same precision on as many threads. Answers are compared before anything is timed.

Without `--full`: the tiny models. With it: the full size at each system's own input, and training steps.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_systems.py --full --compile --results benchmarks/results/systems_cpu.json

Floor: the operations of the accelerated model ("flops") and, in inference, its weights read once ("bytes").
Low-precision rows need a processor that multiplies bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from benchmarks import PACKED, plain
from benchmarks.bench_magnet import operations
from benchmarks.rivals import OPENVINO, openvino
from benchmarks.turns import in_turns
from magnet_fast import models, ops
from magnet_fast.ops import _linear
from magnet_fast.training.terms import build_terms

WORDS = 17


class Case(NamedTuple):
    """A model and the side of its square images; `quick` is measured without --full."""

    preset: str
    title: str
    side: int
    quick: bool = False
    training: bool = True


CASES = (
    Case("refsegformer_tiny", "RefSegformer tiny 128x128", 128, quick=True),
    Case("rela_tiny", "ReLA tiny 128x128", 128, quick=True),
    Case("cris_tiny", "CRIS tiny 128x128", 128, quick=True),
    Case("refsegformer_swin_b", "RefSegformer Swin-B 480x480", 480),
    Case("rela_swin_b", "ReLA Swin-B 480x480", 480),
    Case("cris_r50", "CRIS R50 416x416", 416),
)
IDS = [case.preset for case in CASES]


class Masks(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(image, models.Text(ids, mask)).mask


@contextmanager
def as_published() -> Iterator[None]:
    with plain.models_use_plain_attention(fused_softmax=False), ops.backend("reference"):
        yield


@lru_cache(maxsize=1)
def model_of(preset: str) -> nn.Module:
    """With BatchNorms as after some training: an untrained one divides by one, and kernels may know it."""
    torch.manual_seed(0)
    model = models.create(preset).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def inputs_of(case: Case, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, case.side, case.side, generator=generator)
    ids = torch.randint(5, 1000, (batch, WORDS), generator=generator)
    return image, ids, torch.ones(batch, WORDS, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_inference(case: Case, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    _only_if_wanted(case.quick, request)
    if dtype == torch.bfloat16 and not _linear._works(dtype):
        pytest.skip("this processor does not multiply bfloat16")
    image, ids, mask = inputs_of(case)
    inputs = image.to(dtype), ids, mask
    first = Masks(copy.deepcopy(model_of(case.preset)).to(dtype)).requires_grad_(False)
    ours, packed = copy.deepcopy(first), copy.deepcopy(first)
    magnet_fast.accelerate(ours)
    magnet_fast.accelerate(packed, pack=True)
    flops = operations(lambda: ours(*inputs))

    def in_plain_form(model: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad(), as_published():
                return model(*inputs)

        return run

    runs: dict[str, Callable[[], Any]] = {
        "plain": in_plain_form(first),
        "cpu": lambda: torch.no_grad()(ours)(*inputs),
        PACKED: lambda: torch.no_grad()(packed)(*inputs),
    }
    if request.config.getoption("--compile"):
        runs["torch.compile"] = in_plain_form(torch.compile(first, dynamic=False))
    if (rival := openvino(first, inputs)) is not None:
        runs[OPENVINO] = rival
    truth = runs["plain"]().float()
    for path, run in runs.items():
        error = (run().float() - truth).abs().max() / truth.abs().max()
        assert error < (1e-3 if dtype == torch.float32 else 0.2), f"{path}: {error:.2g} beside the plain form"
    weights = sum(p.numel() * p.element_size() for p in first.parameters())
    _measure(request, case, "inference, batch 1", dtype, runs, {"flops": flops, "bytes": weights})


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_training_step(case: Case, request: pytest.FixtureRequest) -> None:
    _only_if_wanted(case.quick, request)
    batch = 8 if case.quick else 1
    image, ids, mask_of_words = inputs_of(case, batch)
    truth = torch.zeros(batch, case.side, case.side)
    truth[:, case.side // 4 : case.side // 2, case.side // 3 : 2 * case.side // 3] = 1
    target = {"mask": truth, "exists": torch.ones(batch, dtype=torch.bool)}
    first = copy.deepcopy(model_of(case.preset)).train()
    for module in first.modules():  # a batch of one has no statistics
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    ours = copy.deepcopy(first)
    magnet_fast.accelerate(ours)

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        terms = build_terms({}, model, None).values()

        def run() -> None:
            optimiser.zero_grad()
            prediction = model(image, models.Text(ids, mask_of_words))
            sum(term.weight * term(prediction, target, model)[0] for term in terms).backward()
            optimiser.step()

        return run

    plain_step = step_of(first)

    def published() -> None:
        with as_published():
            plain_step()

    _measure(
        request, case, f"training step, batch {batch}", torch.float32, {"plain": published, "cpu": step_of(ours)}, {}
    )


def _only_if_wanted(quick: bool, request: pytest.FixtureRequest) -> None:
    if not quick and not request.config.getoption("--full"):
        pytest.skip("--full")


def _measure(
    request: pytest.FixtureRequest,
    case: Case,
    what: str,
    dtype: torch.dtype,
    runs: dict[str, Callable[[], Any]],
    info: dict[str, Any],
) -> None:
    name = str(dtype).removeprefix("torch.")
    rows = in_turns(runs, "plain", 15 if case.quick else 5, request.config._ceilings, dtype=name, **info)
    group = f"{case.title}, {what}, {name}"
    request.config._turns += [{"suite": "systems", "group": group, **row} for row in rows]
