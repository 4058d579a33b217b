"""The whole model: MagNet tiny at 128×128, Swin-T at 384×384 and Swin-B at 480×480, 20 words, inference and training.

Floor: the matrix products and attention of one run ("flops", counted as PyTorch counts them on the accelerated
model), and in inference every weight read once ("bytes"). At batch 1 and 480×480 Swin-B takes about 290 GFLOP against
1.2 GB of weights: bound by products, in float32 and in bfloat16.

"plain" is the model as it is built, with roll, pad, partition, mask and softmax (`plain`) and the reference operators.
All other rows are after `accelerate(model)`: "reference" with the reference operators, "cpu" with ours, "cpu, packed
weights" with `pack=True`; "torch.compile" compiles it with the reference operators, "cpu, torch.compile" with ours.
Inference in bfloat16 has bfloat16 weights; training in bfloat16 is autocast, as it is done. Gates and sampling offsets,
which start closed and at zero, are opened: a trained model computes behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import magnet_fast
from benchmarks import PACKED, plain
from benchmarks.machine import peak_bytes
from magnet_fast import models, ops
from magnet_fast.ops import _observed
from magnet_fast.training.terms import build_terms


class Case(NamedTuple):
    """A model and its input; `quick` says what runs without --full."""

    preset: str
    title: str
    side: int
    batch: int
    training_batch: int
    quick: tuple[str, ...]


CASES = {
    "tiny": Case("magnet_tiny", "MagNet tiny 128x128", 128, 1, 16, ("inference", "training step")),
    "swin_t": Case("magnet_swin_t", "MagNet Swin-T 384x384", 384, 1, 1, ()),
    "swin_b": Case("magnet_swin_b", "MagNet Swin-B 480x480", 480, 1, 1, ("inference",)),
}
COMPILED = ("torch.compile", "cpu, torch.compile")
PATHS = ["plain", "reference", "cpu", *COMPILED]
DTYPES = [torch.float32, torch.bfloat16]


@contextmanager
def implementation(path: str) -> Iterator[None]:
    if path == "plain":
        with plain.models_use_plain_attention(fused_softmax=False), ops.backend("reference"):
            yield
    else:  # "cpu" takes the C++ kernel of every operator that has one for the dtype
        with ops.backend("auto" if path.startswith("cpu") else "reference"):
            yield


@lru_cache(maxsize=1)
def model_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(CASES[case].preset)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gate." in name or name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            width = parameter.shape[-1] ** -0.5
            parameter.data.copy_(0.3 * width * torch.randn(parameter.shape, generator=generator))
    return model


def batch(case: Case, count: int, vocab: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, case.side, case.side, generator=generator)
    input_ids = torch.randint(5, vocab, (count, 20), generator=generator)
    return image, input_ids, torch.ones_like(input_ids)


def prepare(model: nn.Module, path: str) -> None:
    """As the path wants it, whatever it was before."""
    magnet_fast.restore(model)
    if path != "plain":
        magnet_fast.accelerate(model, pack=path == PACKED)


def operations(run: Callable[[], Any]) -> int:
    """Of the accelerated model, which otherwise runs as it was built where its operations are counted."""
    watched = patch.object(_observed, "watched", lambda: False)
    with watched, ops.backend("reference"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


_flops: dict[tuple[str, str], int] = {}


def measure(benchmark: Any, case: str, mode: str, path: str, dtype: torch.dtype, run: Callable[[], Any]) -> None:
    tiny = case == "tiny"
    if (case, mode) not in _flops and path != "plain":
        _flops[case, mode] = operations(run)
    name = str(dtype).removeprefix("torch.")
    count = CASES[case].batch if mode == "inference" else CASES[case].training_batch
    benchmark.group = f"{CASES[case].title}, {mode}, batch {count}, {name}"
    benchmark.extra_info.update(path=path, baseline="plain", dtype=name, flops=_flops.get((case, mode)))
    with implementation(path):
        benchmark.pedantic(run, rounds=12 if tiny else 4, warmup_rounds=3 if tiny else 1)
        benchmark.extra_info["peak_bytes"] = peak_bytes(run)


def wanted(case: str, mode: str, full: bool) -> None:
    if not full and mode not in CASES[case].quick:
        pytest.skip("--full")


@pytest.mark.parametrize("path", [*PATHS, PACKED])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_inference(benchmark, full: bool, case: str, dtype: torch.dtype, path: str) -> None:
    wanted(case, "inference", full)
    model = model_of(case).eval().requires_grad_(False)  # the counter of operations stumbles over views of parameters
    inputs = batch(CASES[case], CASES[case].batch, model.config.text.vocab_size)
    if dtype != torch.float32:
        model = copied(model).eval().to(dtype)
    if dtype == torch.float32 and path in ("cpu", PACKED):
        agree(model, inputs, path)
    prepare(model, path)
    predict = torch.compile(model.predict, dynamic=False) if path in COMPILED else model.predict
    benchmark.extra_info["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())

    def run() -> None:
        with torch.no_grad():
            predict(*inputs)

    measure(benchmark, case, "inference", path, dtype, run)
    magnet_fast.restore(model)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_training_step(benchmark, full: bool, case: str, dtype: torch.dtype, path: str) -> None:
    wanted(case, "training step", full)
    model = model_of(case).train().requires_grad_(True)
    side, count = CASES[case].side, CASES[case].training_batch
    image, input_ids, mask_of_words = batch(CASES[case], count, model.config.text.vocab_size)
    mask = torch.zeros(count, side, side)
    mask[:, side // 4 : side // 2, side // 3 : 2 * side // 3] = 1
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # the weights stay for the next row
    terms = build_terms({}, model, None).values()
    batch_ = {"mask": mask, "exists": torch.ones(count, dtype=torch.bool)}
    prepare(model, path)
    forward = torch.compile(model, dynamic=False) if path in COMPILED else model

    def run() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            prediction = forward(image, models.Text(input_ids, mask_of_words.bool()))
        sum(term.weight * term(prediction, batch_, model)[0] for term in terms).backward()
        optimiser.step()

    measure(benchmark, case, "training step", path, dtype, run)
    optimiser.zero_grad()
    magnet_fast.restore(model)


def copied(model: nn.Module) -> nn.Module:
    """A plain copy of the model."""
    magnet_fast.restore(model)
    return copy.deepcopy(model)


def agree(model: nn.Module, inputs: tuple[torch.Tensor, ...], ours: str) -> None:
    """The plain path and ours give one answer, so that their times may be compared."""
    found = []
    for path in ("plain", ours):
        prepare(model, path)
        with torch.no_grad(), implementation(path):
            found.append(model.predict(*inputs))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
