"""Pixel contrastive loss of one image, 256 channels, at 30x30, 60x60 and 120x120; time and peak memory.

Floor, with P pixels and C channels: features read once, 4·P·C bytes (and the gradient written once). The
similarity matrix is symmetric, so P²·C operations make it (half of the 2·P²·C that a plain product takes); the
backward pass makes it again and multiplies it with the features, 3·P²·C. Ours takes one P²·C more, because
autograd hands the backward pass the features and not the sums. The plain form also writes and reads P·P matrices.

Peak memory is how far the process's resident set rises above what it was before the run, result and gradient
included; nothing where /proc does not tell.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import ops

CHANNELS, TEMPERATURE = 256, 0.1
ROUNDS = {30: 15, 60: 4, 120: 2}
PATHS = ["plain", "reference", "torch.compile", "cpu"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(features: Tensor, mask: Tensor) -> Tensor:
    """As it is written down: the whole matrix of similarities, its logarithms of sums, a mean for each side."""
    z = F.normalize(features.float().flatten(2).transpose(1, 2), dim=2, eps=1e-6)
    inside = mask.flatten(1)
    similarity = z @ z.transpose(1, 2) / TEMPERATURE
    own = similarity.masked_fill(inside[:, :, None] != inside[:, None], float("-inf"))
    loss = similarity.logsumexp(2) - own.logsumexp(2)
    count = inside.sum(1)
    return (loss * inside).sum(1) / count + (loss * ~inside).sum(1) / (inside.shape[1] - count)


def runner(path: str, side: int, dtype: torch.dtype, backward: bool) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, CHANNELS, side, side, generator=generator).to(dtype).requires_grad_(backward)
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, side // 4 : 3 * side // 4, side // 3 : 2 * side // 3] = True  # an object on a sixth of the image
    compiled = torch.compile(plain) if path == "torch.compile" else None

    def forward() -> Tensor:
        if compiled or path == "plain":
            return (compiled or plain)(features, mask)
        with ops.backend(path):
            return ops.pixel_contrastive_loss(features, mask, temperature=TEMPERATURE)

    def both() -> Tensor:
        return torch.autograd.grad(forward().sum(), features)[0]

    return both if backward else forward


def peak_bytes(run: Callable[[], Tensor]) -> int | None:
    """How far the resident set rises during a run."""
    try:
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)  # freed memory would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ROUNDS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_pixel_contrastive_loss(benchmark, full: bool, path: str, dtype: str, side: int, backward: bool) -> None:
    if not full and (dtype == "bfloat16" and side != 30 or side == 120 and backward):
        pytest.skip("takes long: --full")
    run = runner(path, side, DTYPES[dtype], backward)
    result = run()
    if side < 120:  # at 120x120 that of the reference alone takes seconds
        expected = runner("reference", side, DTYPES[dtype], backward)()
        rough = dtype == "bfloat16" and backward
        tolerance = {"rtol": 0, "atol": (1e-2 if rough else 1e-4) * expected.abs().max().item()}
        torch.testing.assert_close(result, expected, **tolerance)

    pixels, size = side * side, DTYPES[dtype].itemsize
    benchmark.group = f"pixel contrastive loss, {side}x{side}, {dtype}, {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info.update(
        path=path,
        baseline="plain",
        bytes=(2 if backward else 1) * pixels * CHANNELS * size,
        flops=(4 if backward else 1) * pixels * pixels * CHANNELS,
        peak_bytes=peak_bytes(run),
    )
    benchmark.pedantic(run, rounds=ROUNDS[side], warmup_rounds=1 if side < 120 else 0)
