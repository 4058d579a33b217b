"""Systems of this library as whole models, every path of a case timed in turns.

Rows as in whole.py; "plain" is the model as it is built, with roll, pad, partition, mask and softmax (`plain`) and the
reference operators.

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
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from benchmarks import plain
from benchmarks.turns import in_turns
from benchmarks.whole import BOTH, Run, compare, only_if_wanted
from magnet_fast import models, ops
from magnet_fast.training.terms import build_terms

WORDS = 17


class Case(NamedTuple):
    """A model and the side of its square images; `quick` is measured without --full, and bench_magnet.py has MagNet's
    training."""

    preset: str
    title: str
    side: int
    quick: bool = False
    training: bool = True


CASES = (
    Case("magnet_tiny", "MagNet tiny 128x128", 128, quick=True, training=False),
    Case("lavt_tiny", "LAVT tiny 128x128", 128, quick=True),
    Case("refsegformer_tiny", "RefSegformer tiny 128x128", 128, quick=True),
    Case("rela_tiny", "ReLA tiny 128x128", 128, quick=True),
    Case("cris_tiny", "CRIS tiny 128x128", 128, quick=True),
    Case("magnet_swin_b", "MagNet Swin-B 480x480", 480, training=False),
    Case("lavt_swin_b", "LAVT Swin-B 480x480", 480),
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


@BOTH
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_inference(case: Case, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    only_if_wanted(request, case.quick, dtype)
    image, ids, mask = inputs_of(case)
    inputs = image.to(dtype), ids, mask

    def published(model: Callable[..., Tensor]) -> Run:
        def run() -> Tensor:
            with as_published():
                return model(*inputs)

        return run

    model = Masks(copy.deepcopy(model_of(case.preset)).to(dtype))
    rounds = 15 if case.quick else 5
    compare(request, "systems", f"{case.title}, batch 1", model, inputs, rounds=rounds, dtype=dtype, plain=published)


@pytest.mark.parametrize("case", [case for case in CASES if case.training], ids=lambda case: case.preset)
def test_training_step(case: Case, request: pytest.FixtureRequest) -> None:
    only_if_wanted(request, case.quick)
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

    runs = {"plain": published, "cpu": step_of(ours)}
    rows = in_turns(runs, "plain", 15 if case.quick else 5, request.config._ceilings, dtype="float32")
    group = f"{case.title}, training step, batch {batch}, float32"
    request.config._turns += [{"suite": "systems", "group": group, **row} for row in rows]
