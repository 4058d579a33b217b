"""Window attention at the stages of Swin-B, 480×480, window 12, shifted blocks, batch 1.

Floor: q, k, v read once and the result written once, 16·H·W·C bytes (float32); with N = 144 keys a query each
window-head also takes 4·N²·d operations.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain
from magnet_fast import ops

STAGES = {1: (120, 128, 4), 2: (60, 256, 8), 3: (30, 512, 16), 4: (15, 1024, 32)}  # side, channels, heads
PATHS = ["plain", "plain SDPA", "reference", "cpu"]


def runner(path: str, stage: int, backward: bool):
    side, channels, heads = STAGES[stage]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, side, side, 3 * channels, generator=generator, requires_grad=backward)
    table = (0.1 * torch.randn(23 * 23, heads, generator=generator)).requires_grad_(backward)
    pad = torch.randn(3 * channels, generator=generator, requires_grad=backward)
    grad = torch.randn(1, side, side, channels, generator=generator)
    arguments = {"num_heads": heads, "window_size": 12, "shift": 6, "pad_qkv": pad}

    def forward() -> torch.Tensor:
        if path.startswith("plain"):
            return plain.window_attention(qkv, table, **arguments, fused_softmax=path == "plain SDPA")
        with ops.backend(path):
            return ops.window_attention(qkv, table, **arguments)

    def both() -> None:
        torch.autograd.grad(forward(), (qkv, table, pad), grad, allow_unused=True)  # pad: only where it pads

    return both if backward else forward


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_window_attention(benchmark, path: str, stage: int, backward: bool) -> None:
    run = runner(path, stage, backward)
    if not backward:
        torch.testing.assert_close(run(), runner("reference", stage, False)(), rtol=1e-4, atol=1e-4)
    benchmark.group = f"window attention, Swin-B stage {stage}, {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info.update(path=path, baseline="plain")
    benchmark.pedantic(run, rounds=15, warmup_rounds=3)
