"""Window attention's Triton kernels in the interpreter, against the reference in float64."""

import pytest
import torch
from magnet_fast.kernels import window_attention

from magnet_fast import ops
from magnet_fast.ops import _triton_window
from tests.ops.cases import window_case

from .agreement import assert_accurate, assert_each_gradient_alone

ORDERS = pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
NAMES = ("output", "gradient of qkv", "gradient of bias_table", "gradient of pad_qkv")
# The interpreter pretends to have two multiprocessors: with one head, several programs share the windows.
SHAPES = {
    "rectangular": {"size": (5, 4), "window": (2, 3), "shift": (1, 2), "d": 8},
    "w 7": {"size": (7, 8), "window": (7, 7), "shift": (3, 3), "d": 32},
    "odd numbers": {"size": (7, 6), "window": (3, 5), "shift": (1, 0), "d": 5},
    "map smaller than the shift": {"size": (3, 6), "window": (5, 5), "shift": (4, 2), "d": 8},
    "no padding, no shift": {"size": (8, 4), "window": (4, 4), "shift": (0, 0), "d": 16},
}
W_12 = {"size": (12, 11), "window": (12, 12), "shift": (6, 6), "d": 16}


def small(**options):
    return window_case(**{"batch": 1, "heads": 1, "dtype": torch.float32, **options})


def run(case, backend):
    """Output and every gradient."""
    with ops.backend(backend):
        return (*case(), *case.gradients())


def in_float64(case):
    return type(case)(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)


def assert_agrees(case):
    results = run(case, "triton"), run(case, "reference"), run(in_float64(case), "reference")
    assert all(ours.is_contiguous() for ours in results[0])
    assert_accurate(*results, case.leaves[0].dtype)


def assert_near(case):
    """float32 within a few roundings of the largest value; half the price of `assert_agrees`."""
    for name, ours, exact in zip(NAMES, run(case, "triton"), run(in_float64(case), "reference"), strict=False):
        error, scale = (ours - exact).abs().max().item(), exact.abs().max().item()
        assert error <= 2e-6 * max(1.0, scale), f"{name}: {error}"


@DTYPES
@ORDERS
def test_agrees_with_the_reference(pad_first, dtype):
    assert_agrees(small(**SHAPES["rectangular"], heads=2, pad_first=pad_first, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_w_7(dtype):
    """A whole window in one tile in low precision, tiles of 16 in float32."""
    assert_agrees(small(**SHAPES["w 7"], dtype=dtype))


@ORDERS
@pytest.mark.parametrize("shape", ["odd numbers", "map smaller than the shift"])
def test_agrees_in_float32(shape, pad_first):
    assert_near(small(**SHAPES[shape], pad_first=pad_first))


@pytest.mark.parametrize("shape", ["odd numbers", "map smaller than the shift", "no padding, no shift"])
def test_padding_of_zeros(shape):
    assert_near(small(**SHAPES[shape], padding=False))


def test_w_12():
    """Several tiles, three pieces of keys, another kernel for dK and dV; a table in float32 beside bfloat16."""
    case = small(**W_12, pad_first=False, dtype=torch.bfloat16)
    case.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in case.leaves[1:]]
    assert_agrees(case)


def test_several_tiles_in_float32():
    """Two pieces of keys, of which one is short; three are `test_largest_window`'s, forward, and `test_w_12`'s."""
    assert_near(small(size=(8, 11), window=(8, 9), shift=(4, 4), d=8))


def test_largest_window():
    """No gradients: those are `test_w_12`'s, in other tiles."""
    case = small(size=(16, 15), window=(16, 16), shift=(0, 5), d=8)
    with ops.backend("triton"):
        ours = case()[0]
    torch.testing.assert_close(ours, run(in_float64(case), "reference")[0].float(), rtol=1e-5, atol=1e-5)


@ORDERS
def test_every_padding_residue(pad_first):
    for height, width in ((2, 3), (3, 4), (4, 2)):
        assert_near(small(size=(height, width), window=(3, 3), shift=(2, 1), d=2, pad_first=pad_first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["tiles", "whole window"])
def test_one_gradient_at_a_time(dtype):
    assert_each_gradient_alone(small(**SHAPES["rectangular"], dtype=dtype))


def test_same_bits_twice():
    case = small(size=(5, 4), window=(3, 3), shift=(1, 1), d=16, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(case, "triton"), run(case, "triton"), strict=True))


def test_views():
    """A slice of a wider tensor, of every other image, and a gradient with strides of its own."""
    case = small(batch=4, size=(3, 4), window=(3, 3), shift=(1, 1), d=8)
    qkv, table, pad = (leaf.detach() for leaf in case.leaves)
    wide = torch.full((4, 3, 6, qkv.shape[3] + 9), torch.nan)
    wide[:, :, 1:-1, 3:-6] = qkv
    view = wide[::2, :, 1:-1, 3:-6].requires_grad_()
    grad = torch.randn(2, 4, 3, 8).transpose(1, 2)  # (2, 3, 4, 8)
    found = {}
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            out = case(view, table, pad)[0]
            found[backend] = out.detach(), *torch.autograd.grad(out, view, grad)
            found[backend] += torch.autograd.grad(case(view, table, pad)[0].sum(), view)  # an expanded gradient
    for ours, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_nan_goes_where_the_reference_sends_it():
    case = small(size=(7, 9), window=(4, 5), shift=(2, 2), d=8)
    case.leaves[0].data[0, 3, 4] = torch.nan
    ours, plain = (run(case, backend)[0].isnan() for backend in ("triton", "reference"))
    assert torch.equal(ours, plain) and 0 < ours.sum() < ours.numel()


def test_minus_infinity_in_the_table():
    case = small(size=(6, 7), window=(4, 4), shift=(2, 2), d=8)
    case.leaves[1].data[:20] = -torch.inf
    results = run(case, "triton")
    assert all(tensor.isfinite().all() for tensor in results)
    torch.testing.assert_close(results[0], run(case, "reference")[0], rtol=1e-4, atol=1e-5)


def test_registered_for_compilation():
    case = small(size=(2, 4), window=(2, 3), d=8, dtype=torch.bfloat16)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.magnet_fast.window_attention.default, (*arguments, "triton"), test_utils=checks)
    with ops.backend("triton"):
        compiled = torch.compile(lambda *leaves: case(*leaves)[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*case.leaves), case()[0])


def test_auto_never_takes_the_interpreter():
    case = window_case(dtype=torch.float32)
    args, kwargs = case.arguments(*case.leaves)
    explanation = ops.explain("window_attention", *args, **kwargs)
    assert explanation.chosen != "triton"
    assert "interpreter is for tests" in explanation.reasons["triton"]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype float64 is not supported", {"dtype": torch.float64}),
        ("a window of 20x13 tokens is not supported, at most 256 tokens", {"window": (20, 13)}),
        ("66 channels a head are not supported, at most 64", {"d": 66}),
        (
            "a window of 12x13 tokens is not supported, at most 144 tokens with more than 32",
            {"window": (12, 13), "d": 34},
        ),
    ],
)
def test_what_the_kernels_do_not_take(reason, change):
    with ops.backend("triton"), pytest.raises(ops.BackendError, match=reason):
        window_case(**{"dtype": torch.float32, **change})()


def test_limits_are_the_kernels():
    assert _triton_window._LARGEST_WINDOW == window_attention.LARGEST_WINDOW
    assert _triton_window._LARGEST_WINDOW_OF_WIDE == window_attention.LARGEST_WINDOW_OF_WIDE
    assert _triton_window._LARGEST_IMAGE == window_attention.LARGEST_IMAGE
    huge = torch.empty(24).expand(1, 40_000, 30_000, 24)
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="an image of 28800000000 numbers"):
        ops.window_attention(huge, torch.zeros(9, 1), num_heads=1, window_size=2)
