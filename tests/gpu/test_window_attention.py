"""Window attention's Triton kernels on the device, against the reference in float64 on the CPU."""

import pytest
import torch

from magnet_fast import ops
from tests.ops.cases import assert_low_precision, window_case

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


def on_gpu(case):
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in case.leaves]
    return type(case)(case.operator, leaves, case.arguments)


def in_float64(case):
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    return type(case)(case.operator, leaves, case.arguments)


def run(case, backend):
    """Output and every gradient, for a gradient of the output that is the same on both devices."""
    with ops.backend(backend):
        out = case()[0]
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return (out.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(out, case.leaves, weights)))


@DTYPES
@ORDERS
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(shape, pad_first, dtype):
    case = window_case(**SHAPES[shape], pad_first=pad_first, dtype=dtype)
    truth, plain = run(in_float64(case), "reference"), run(case, "reference")
    for name, ours, rival, exact in zip(NAMES, run(on_gpu(case), "triton"), plain, truth, strict=True):
        assert_low_precision(ours, rival, exact, dtype, name)


def test_auto_takes_triton():
    case = on_gpu(window_case(dtype=torch.float32))
    args, kwargs = case.arguments(*case.leaves)
    assert ops.explain("window_attention", *args, **kwargs).chosen == "triton"


@DTYPES
@pytest.mark.parametrize("shape", ["w 7", "w 12"])
def test_same_bits_over_and_over(shape, dtype):
    case = on_gpu(window_case(batch=4, **SHAPES[shape], dtype=dtype))
    first = run(case, "triton")
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(case, "triton"), first, strict=True))


def test_more_windows_and_heads_than_grid_y_has():
    case = window_case(batch=300, size=(32, 32), window=(4, 4), shift=(2, 2), heads=4, d=8, dtype=torch.float32)
    assert 300 * 8 * 8 * 4 > 65_535
    with ops.backend("triton"):
        ours = on_gpu(case)()[0]
    with ops.backend("reference"):
        torch.testing.assert_close(ours.cpu(), case()[0], rtol=1e-4, atol=1e-4)


def test_another_stream():
    case = on_gpu(window_case(**SHAPES["w 7"], dtype=torch.bfloat16))
    expected, stream = run(case, "triton"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        found = run(case, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_cuda_graph():
    case = on_gpu(window_case(**SHAPES["w 7"], dtype=torch.bfloat16))
    expected = run(case, "triton")[0]
    args, kwargs = case.arguments(*(leaf.detach() for leaf in case.leaves))
    graph = torch.cuda.CUDAGraph()
    with ops.backend("triton"), torch.cuda.graph(graph):
        out = ops.window_attention(*args, **kwargs)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out.cpu(), expected)


def test_torch_compile():
    case = on_gpu(window_case(**SHAPES["w 7"], dtype=torch.float32))
    with ops.backend("triton"):
        compiled = torch.compile(lambda *leaves: case(*leaves)[0], fullgraph=True)
        torch.testing.assert_close(compiled(*case.leaves), case()[0])
