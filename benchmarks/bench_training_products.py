"""The three products of a Linear in training in float32, PyTorch's (MKL) beside oneDNN's, and a whole training step.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_training_products.py --results FILE.json

With MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment MKL takes the instructions that it takes on processors which are
not Intel's: a stand-in for one. Shapes are MagNet Swin-B's at 480x480, batch 1.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import magnet_fast
from benchmarks.bench_magnet import CASES, batch, model_of
from benchmarks.turns import in_turns
from magnet_fast import models
from magnet_fast.ops import _linear, _training_products
from magnet_fast.training.terms import build_terms

SHAPES = (  # rows, inputs, outputs
    (14400, 128, 512),
    (14400, 512, 128),
    (19125, 256, 1024),
    (19125, 1024, 256),
    (3600, 256, 1024),
    (900, 512, 2048),
    (900, 2048, 512),
    (225, 1024, 4096),
)


@pytest.fixture(autouse=True)
def able() -> None:
    if not _linear._works(torch.float32):
        pytest.skip("no oneDNN")


def keep(request: pytest.FixtureRequest, group: str, rows: list[dict]) -> None:
    instructions = os.environ.get("MKL_ENABLE_INSTRUCTIONS")
    group += f", MKL at {instructions}" if instructions else ""
    request.config._turns += [{"suite": "training products", "group": group, **row} for row in rows]


@pytest.mark.parametrize(("count", "inputs", "outputs"), SHAPES)
def test_products(count: int, inputs: int, outputs: int, request: pytest.FixtureRequest) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(count, width, generator=generator) for width in (inputs, outputs))
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    products = {
        "forward": (lambda: F.linear(x, weight), lambda: _training_products._onednn(x, weight)),
        "input's gradient": (lambda: gradient @ weight, lambda: _training_products._onednn(gradient, weight.t())),
        "weight's gradient": (
            lambda: gradient.t() @ x,
            lambda: _training_products.weight_gradient(gradient, x),
        ),
    }
    for name, (mkl, onednn) in products.items():
        torch.testing.assert_close(mkl(), onednn(), atol=1e-2, rtol=1e-3)
        info = {"dtype": "float32", "flops": 2 * count * inputs * outputs}
        rows = in_turns({"MKL": mkl, "oneDNN": onednn}, "MKL", 9, request.config._ceilings, **info)
        keep(request, f"{count} rows, {inputs} to {outputs}, {name}", rows)


def test_training_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MagNet Swin-B, accelerated, with what was measured here and without."""
    case, model = CASES["swin_b"], model_of("swin_b").train()
    image, input_ids, words = batch(case, 1, model.config.text.vocab_size)
    text, mask = models.Text(input_ids, words.bool()), torch.zeros(1, case.side, case.side)
    mask[:, case.side // 4 : case.side // 2, case.side // 3 : 2 * case.side // 3] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    terms = build_terms({}, model, None).values()
    given = {"mask": mask, "exists": torch.ones(1, dtype=torch.bool)}

    def step(choice: str) -> None:
        monkeypatch.setenv("MAGNET_FAST_CHOICE", choice)
        optimizer.zero_grad()
        prediction = model(image, text)
        sum(term.weight * term(prediction, given, model)[0] for term in terms).backward()
        optimizer.step()

    monkeypatch.setenv("MAGNET_FAST_CHOICE", "measure")
    magnet_fast.accelerate(model)
    products = _linear.training_products()
    taken = [name.replace("_", " ") for name in _training_products._NAMES if getattr(products, name)]
    runs = {"PyTorch's products": lambda: step("guess"), "measured products": lambda: step("measure")}
    rows = in_turns(runs, "PyTorch's products", 6, request.config._ceilings, dtype="float32")
    magnet_fast.restore(model)
    keep(request, f"MagNet Swin-B, training step, batch 1; by oneDNN: {', '.join(taken) or 'none'}", rows)
