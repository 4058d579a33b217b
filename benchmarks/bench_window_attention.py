"""Window attention at the stages of Swin, batch 1: float32 and bfloat16, forward and forward+backward.

Without `--full`: Swin-B at 480 x 480 with window 12, every stage shifted, the first one unshifted as well, and
the first one with window 7. With it: Swin-T and Swin-B at 224, 384 and 480, windows 7 and 12. torch.compile takes the
plain form.

Floor of the forward pass: q, k and v read once and the result written once, 4·H·W·C numbers; every query meets
N = w² keys, which is 4·N·d operations for each of its heads (2·N·d for its logits, as many for its result) and one
exponential a key. The backward pass reads qkv and the result's gradient and writes qkv's gradient, 7·H·W·C numbers,
and takes five products to the forward pass's two: 10·N·d operations. Padded tokens count as the one key that they
are; after a shift, queries meet the keys of their own region only, which `operations` counts.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain
from benchmarks.window_shapes import MODELS, Shape, traffic
from magnet_fast import ops

PATHS = ["plain", "plain SDPA", "torch.compile", "reference", "cpu"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


SUBSET = [
    *(Shape("Swin-B", 480, stage, 12, True) for stage in (1, 2, 3, 4)),
    Shape("Swin-B", 480, 1, 12, False),
    Shape("Swin-B", 480, 1, 7, True),
]
ALL = [
    Shape(model, side, stage, window, shifted)
    for model in MODELS
    for side in (224, 384, 480)
    for stage in (1, 2, 3, 4)
    for window in (7, 12)
    for shifted in (False, True)
]


def runner(path: str, shape: Shape, dtype: torch.dtype, backward: bool):
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, factor: float = 1.0, grad: bool = backward) -> torch.Tensor:
        return (factor * torch.randn(size, generator=generator)).to(dtype).requires_grad_(grad)

    extent, channels = shape.extent, shape.channels
    qkv = draw(1, extent, extent, 3 * channels)
    table = draw((2 * shape.window - 1) ** 2, shape.heads, factor=0.1)
    pad = draw(3 * channels)
    grad = draw(1, extent, extent, channels, grad=False)
    arguments = {"num_heads": shape.heads, "window_size": shape.window, "shift": shape.shift, "pad_qkv": pad}
    attend = plain.compiled_window_attention() if path == "torch.compile" else plain.window_attention

    def forward() -> torch.Tensor:
        if path in ("plain", "plain SDPA", "torch.compile"):
            return attend(qkv, table, **arguments, fused_softmax=path == "plain SDPA")
        with ops.backend(path):
            return ops.window_attention(qkv, table, **arguments)

    def both() -> None:
        torch.autograd.grad(forward(), (qkv, table, pad), grad, allow_unused=True)  # pad: only where it pads

    return both if backward else forward


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rows for --full, or the subset without it."""
    full = metafunc.config.getoption("--full", default=False)
    metafunc.parametrize("shape", ALL if full else SUBSET, ids=str)
    metafunc.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
    metafunc.parametrize("dtype", DTYPES)
    metafunc.parametrize("path", PATHS)


def test_window_attention(benchmark, path: str, dtype: str, backward: bool, shape: Shape) -> None:
    run = runner(path, shape, DTYPES[dtype], backward)
    if not backward:
        step = 1e-4 if dtype == "float32" else 5e-2
        torch.testing.assert_close(run(), runner("reference", shape, DTYPES[dtype], False)(), rtol=step, atol=step)
    benchmark.group = f"window attention, {shape}, {dtype}, {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info.update(path=path, baseline="plain", dtype=dtype, **traffic(shape, DTYPES[dtype], backward))
    benchmark.pedantic(run, rounds=11 if not backward else 7, warmup_rounds=2)
