"""Window attention's Triton and CUDA kernels on the device, against the reference in float64 on the CPU."""

import pytest
import torch

from magnet_fast import ops
from tests.kernels.agreement import in_float64
from tests.ops.cases import assert_low_precision, window_case

from .device import assert_same_bits, backends_of, on_gpu

BACKENDS = backends_of("window_attention")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ORDERS = pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
NAMES = ("output", "gradient of qkv", "gradient of bias_table", "gradient of pad_qkv")
SHAPES = {
    "w 7": {"size": (30, 17), "window": (7, 7), "shift": (3, 3), "d": 32},
    "w 7, d 64": {"size": (15, 20), "window": (7, 7), "shift": (3, 3), "d": 64},
    "w 8": {"size": (16, 24), "window": (8, 8), "shift": (4, 4), "d": 32},
    "w 12": {"size": (30, 25), "window": (12, 12), "shift": (6, 6), "d": 32},
    "w 12, d 64": {"size": (15, 24), "window": (12, 12), "shift": (0, 0), "d": 64},
    "w 16": {"size": (17, 31), "window": (16, 16), "shift": (8, 8), "d": 32},
    "rectangular": {"size": (11, 13), "window": (4, 9), "shift": (1, 5), "d": 16},
    "odd numbers": {"size": (7, 9), "window": (3, 5), "shift": (1, 2), "d": 5},
}


def run(case, backend):
    """Output and every gradient, for a gradient of the output that is the same on both devices."""
    with ops.backend(backend):
        out = case()[0]
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return (out.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(out, case.leaves, weights)))


@BACKENDS
@DTYPES
@ORDERS
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(shape, pad_first, dtype, backend):
    case = window_case(**SHAPES[shape], pad_first=pad_first, dtype=dtype)
    truth, plain = run(in_float64(case), "reference"), run(case, "reference")
    for name, ours, rival, exact in zip(NAMES, run(on_gpu(case), backend), plain, truth, strict=True):
        assert_low_precision(ours, rival, exact, dtype, name)


def test_auto_takes_triton():
    case = on_gpu(window_case(dtype=torch.float32))
    args, kwargs = case.arguments(*case.leaves)
    assert ops.explain("window_attention", *args, **kwargs).chosen == "triton"


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", ["w 7", "w 12"])
def test_same_bits_over_and_over(shape, dtype, backend):
    assert_same_bits(window_case(batch=4, **SHAPES[shape], dtype=dtype), backend)


@BACKENDS
@pytest.mark.parametrize("shape", ["w 7", "w 12"])
def test_same_bits_ten_thousand_times(shape, backend):
    assert_same_bits(window_case(batch=4, **SHAPES[shape], dtype=torch.bfloat16), backend, times=10_000)


@BACKENDS
def test_more_windows_and_heads_than_grid_y_has(backend):
    case = window_case(batch=300, size=(32, 32), window=(4, 4), shift=(2, 2), heads=4, d=8, dtype=torch.float32)
    assert 300 * 8 * 8 * 4 > 65_535
    with ops.backend(backend):
        ours = on_gpu(case)()[0]
    with ops.backend("reference"):
        torch.testing.assert_close(ours.cpu(), case()[0], rtol=1e-4, atol=1e-4)


@BACKENDS
def test_another_stream(backend):
    case = on_gpu(window_case(**SHAPES["w 7"], dtype=torch.bfloat16))
    expected, stream = run(case, backend), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        found = run(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@BACKENDS
def test_cuda_graph(backend):
    case = on_gpu(window_case(**SHAPES["w 7"], dtype=torch.bfloat16))
    expected = run(case, backend)[0]
    args, kwargs = case.arguments(*(leaf.detach() for leaf in case.leaves))
    graph = torch.cuda.CUDAGraph()
    with ops.backend(backend), torch.cuda.graph(graph):
        out = ops.window_attention(*args, **kwargs)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out.cpu(), expected)


@BACKENDS
def test_torch_compile(backend):
    case = on_gpu(window_case(**SHAPES["w 7"], dtype=torch.float32))
    with ops.backend(backend):
        compiled = torch.compile(lambda *leaves: case(*leaves)[0], fullgraph=True)
        torch.testing.assert_close(compiled(*case.leaves), case()[0])
