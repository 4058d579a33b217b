"""Relative attention's Triton kernels on the device, against the reference in float64 on the CPU."""

import pytest
import torch

from magnet_fast import ops
from tests.ops.cases import relative_case

from .device import assert_agrees, assert_captured, assert_same_bits, backends_of, on_gpu, run

BACKENDS = backends_of("relative_attention")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SHAPES = {
    "w 14": {"size": (30, 17), "window": (14, 14), "d": 64},
    "w 14, nothing padded": {"size": (28, 14), "window": (14, 14), "d": 32},
    "rectangular": {"size": (11, 13), "window": (4, 9), "d": 16},
    "map": {"size": (32, 32), "window": None, "d": 64},
    "map of 64 columns": {"size": (9, 64), "window": None, "d": 32},
    "map of several columns of blocks": {"size": (7, 90), "window": None, "d": 16},
    "odd numbers": {"size": (7, 9), "window": (3, 5), "d": 5},
}
WIDE = {
    "w 14": {"size": (15, 20), "window": (14, 14), "d": 80},
    "map": {"size": (20, 32), "window": None, "d": 80},
    "widest": {"size": (6, 50), "window": None, "d": 128},
}


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(shape, dtype, backend):
    assert_agrees(relative_case(**SHAPES[shape], dtype=dtype), backend)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", WIDE)
def test_wide_heads_agree(shape, dtype, backend):
    assert_agrees(relative_case(**WIDE[shape], dtype=dtype), backend)


@BACKENDS
def test_tables_in_float32(backend):
    case = relative_case(**SHAPES["w 14"], dtype=torch.bfloat16)
    case.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in case.leaves[1:]]
    assert_agrees(case, backend)


def test_auto_takes_triton():
    args, kwargs = (case := on_gpu(relative_case(dtype=torch.float32))).arguments(*case.leaves)
    assert ops.explain("relative_attention", *args, **kwargs).chosen == "triton"


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", ["w 14", "map of several columns of blocks"])
def test_same_bits_over_and_over(shape, dtype, backend):
    assert_same_bits(relative_case(batch=4, **SHAPES[shape], dtype=dtype), backend)


@BACKENDS
@pytest.mark.parametrize("shape", ["w 14", "map of several columns of blocks"])
def test_same_bits_ten_thousand_times(shape, backend):
    assert_same_bits(relative_case(**SHAPES[shape], dtype=torch.bfloat16), backend, times=10_000)


@BACKENDS
@pytest.mark.parametrize("shape", ["w 14", "map"])
def test_cuda_graph_without_synchronisation(shape, backend):
    assert_captured(relative_case(**SHAPES[shape], dtype=torch.bfloat16), backend)


@BACKENDS
def test_another_stream(backend):
    case = on_gpu(relative_case(**SHAPES["w 14"], dtype=torch.bfloat16))
    expected, stream = run(case, backend), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        found = run(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@BACKENDS
def test_torch_compile(backend):
    case = on_gpu(relative_case(**SHAPES["w 14"], dtype=torch.float32))
    with ops.backend(backend):
        compiled = torch.compile(lambda *leaves: case(*leaves)[0], fullgraph=True)
        torch.testing.assert_close(compiled(*case.leaves), case()[0])
