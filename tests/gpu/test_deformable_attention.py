"""Deformable attention's Triton and CUDA kernels on the device, against the reference in float64 on the CPU."""

import pytest
import torch

from tests.ops.cases import random_deformable_case as random_case

from .device import assert_agrees, assert_captured, assert_same_bits, backends_of

BACKENDS = backends_of("deformable_attention")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
PYRAMID = [(30, 28), (15, 14), (8, 7)]
SHAPES = {
    "pyramid": {"batch": 2, "maps": PYRAMID, "queries": 500, "heads": 8, "d": 32, "spread": 0.3},
    "wide heads": {"maps": PYRAMID, "queries": 100, "heads": 2, "d": 72, "points": 3},
    "crowded": {"maps": [(2, 2), (1, 1)], "queries": 3000, "heads": 2, "d": 16, "spread": 0.2},
    "one query": {"maps": [(5, 3)], "queries": 1, "points": 1, "d": 5},
}


@BACKENDS
@DTYPES
@pytest.mark.parametrize("form", ["plain", "fused", "boxes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(form, shape, dtype, backend):
    assert_agrees(random_case(form=form, **SHAPES[shape], dtype=dtype), backend)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", ["pyramid", "crowded"])
def test_same_bits_over_and_over(shape, dtype, backend):
    assert_same_bits(random_case(form="fused", **SHAPES[shape], dtype=dtype), backend)


@BACKENDS
def test_cuda_graph_without_synchronisation(backend):
    assert_captured(random_case(form="fused", **SHAPES["pyramid"], dtype=torch.bfloat16), backend)


@BACKENDS
def test_same_bits_ten_thousand_times(backend):
    assert_same_bits(random_case(form="fused", **SHAPES["pyramid"], dtype=torch.bfloat16), backend, times=10_000)
