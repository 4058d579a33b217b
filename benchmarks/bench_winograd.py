"""3x3 convolutions in float32 by Winograd's algorithm beside oneDNN's, at sizes of LAVT and CRIS, timed in turns.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_winograd.py --results benchmarks/results/winograd_cpu.json

Both have packed weights, a bias and ReLU; "flops" are those of the sum over a 3x3 window: a share of the ceiling may be
above one.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.turns import in_turns
from magnet_fast.ops import _convolution, _winograd

SHAPES = (  # inputs, outputs, side
    (640, 512, 120),
    (512, 512, 120),
    (768, 512, 60),
    (1536, 512, 30),
    (512, 256, 104),
    (512, 512, 52),
    (512, 512, 26),
    (64, 64, 104),
    (512, 512, 13),
)


@pytest.mark.parametrize(("inputs", "outputs", "side"), SHAPES)
def test_convolution(inputs: int, outputs: int, side: int, request: pytest.FixtureRequest) -> None:
    if not _convolution._works(torch.float32) or _winograd.level() == "portable":
        pytest.skip("no oneDNN, or no vectors")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(1, inputs, side, side, generator=generator).relu().to(memory_format=torch.channels_last)
    shape = (1, 1), (1, 1), (1, 1), 1
    reordered, packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, x.shape), _winograd.pack(weight)
    runs = {
        "oneDNN": lambda: torch.ops.mkldnn._convolution_pointwise(x, reordered, bias, *shape, "relu", [], ""),
        "cpu": lambda: _winograd.run(x, packed, bias, rectify=True),
    }
    with torch.no_grad():
        torch.testing.assert_close(runs["cpu"](), runs["oneDNN"](), atol=1e-4, rtol=1e-4)
        info = {"dtype": "float32", "flops": 2 * 9 * inputs * outputs * side**2}
        rows = in_turns(runs, "oneDNN", 15, request.config._ceilings, **info)
    group = f"{inputs} to {outputs} channels on {side}x{side}"
    request.config._turns += [{"suite": "winograd", "group": group, **row} for row in rows]
