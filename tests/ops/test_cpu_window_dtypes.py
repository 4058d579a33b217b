"""Window attention's C++ kernels in float64, bfloat16 and float16, at every SIMD level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import _cpu, ops

from .cases import assert_low_precision, in_float64, run, weighted_sum, window_case

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LEVELS = _cpu.supported_simd_levels()
SHAPES = {
    "one vector of keys": {"size": (5, 4), "window": (2, 3), "shift": (1, 2), "d": 8},
    "odd numbers": {"size": (7, 9), "window": (3, 5), "shift": (1, 2), "d": 5},
    "w 7": {"size": (15, 8), "window": (7, 7), "shift": (3, 3), "d": 32},
    "w 12, padded": {"size": (15, 30), "window": (12, 12), "shift": (6, 6), "heads": 1, "d": 32, "batch": 1},
    "w 12, unshifted": {"size": (12, 24), "window": (12, 12), "shift": (0, 0), "heads": 1, "d": 32, "batch": 1},
    "keys beyond the registers": {"size": (17, 16), "window": (16, 16), "shift": (0, 0), "heads": 1, "d": 48},
    "head_dim 1": {"size": (9, 6), "window": (4, 4), "shift": (2, 1), "d": 1},
}


@pytest.fixture(autouse=True)
def _restore_level():
    before = _cpu.simd_level()
    yield
    _cpu.set_simd_level(before)


def assert_agrees(case, dtype):
    """The kernel against the reference in the same dtype, both measured by the reference in float64."""
    names = ("output", "gradient of qkv", "gradient of bias_table", "gradient of pad_qkv")
    truth = run(in_float64(case), "reference")
    results = zip(names, run(case, "cpu"), run(case, "reference"), truth, strict=False)
    for name, ours, plain, exact in results:
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        assert_low_precision(ours, plain, exact, dtype, name)


@LOW
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision(shape, level, dtype):
    _cpu.set_simd_level(level)
    assert_agrees(window_case(**SHAPES[shape], dtype=dtype), dtype)


@LOW
@pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
def test_table_and_padding_token_in_float32(dtype, pad_first):
    case = window_case(**SHAPES["w 7"], pad_first=pad_first, dtype=dtype)
    case.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in case.leaves[1:]]
    assert_agrees(case, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_low_precision_for_any_sizes(data):
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]), "dtype")
    window = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)), "window")
    case = window_case(
        batch=data.draw(st.integers(1, 2), "batch"),
        size=data.draw(st.tuples(st.integers(1, 17), st.integers(1, 17)), "size"),
        window=window,
        shift=tuple(data.draw(st.integers(0, side - 1), "shift") for side in window),
        heads=data.draw(st.integers(1, 3), "heads"),
        d=data.draw(st.integers(1, 70), "d"),
        padding=data.draw(st.booleans(), "padding"),
        pad_first=data.draw(st.booleans(), "pad_first"),
        dtype=dtype,
    )
    assert_agrees(case, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
def test_float64_equals_the_reference(shape, pad_first):
    case = window_case(**SHAPES[shape], pad_first=pad_first)
    for ours, exact in zip(run(case, "cpu"), run(case, "reference"), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
def test_gradcheck(padding, pad_first):
    case = window_case(padding=padding, pad_first=pad_first)
    with ops.backend("cpu"):
        assert torch.autograd.gradcheck(case, case.leaves)


@LOW
@pytest.mark.parametrize("which", range(3), ids=["qkv", "bias_table", "pad_qkv"])
def test_one_gradient_at_a_time(which, dtype):
    case = window_case(**SHAPES["w 7"], dtype=dtype)
    with ops.backend("cpu"):
        together = case.gradients()[which]
        leaves = [leaf if i == which else leaf.detach() for i, leaf in enumerate(case.leaves)]
        (alone,) = torch.autograd.grad(weighted_sum(case(*leaves)), leaves[which])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_same_bits_whatever_the_threads(dtype):
    case = window_case(batch=3, size=(15, 17), window=(7, 7), shift=(3, 3), heads=3, d=16, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(case, "cpu")
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(case, "cpu"), first, strict=True))
    finally:
        torch.set_num_threads(before)


@LOW
def test_views(dtype):
    """A qkv that is a slice of a wider tensor, odd channels first: no row begins at a whole word."""
    case = window_case(size=(9, 7), window=(4, 4), shift=(2, 1), d=6, dtype=dtype)
    qkv = case.leaves[0].detach()
    wide = torch.full((*qkv.shape[:3], qkv.shape[3] + 9), torch.nan, dtype=dtype)
    wide[..., 3:-6] = qkv
    with ops.backend("cpu"):
        assert torch.equal(case(wide[..., 3:-6], *case.leaves[1:])[0], case()[0])


@LOW
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_go_where_the_reference_sends_them(bad, level, dtype):
    _cpu.set_simd_level(level)
    case = window_case(size=(7, 9), window=(4, 5), shift=(2, 2), d=8, dtype=dtype)
    case.leaves[0].data[0, 3, 4] = bad
    with ops.backend("cpu"):
        ours = case()[0]
    with ops.backend("reference"):
        plain = case()[0]
    assert torch.equal(ours.isnan(), plain.isnan())
    assert 0 < ours.isnan().sum() < ours.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_extreme_logits(dtype):
    """Weights that vanish, and -infinity in the table: nothing overflows, no key of weight 0 is seen."""
    case = window_case(size=(6, 7), window=(4, 4), shift=(2, 2), d=8, dtype=dtype)
    case.leaves[1].data[:20] = -torch.inf
    case.leaves[1].data[20:] *= 300
    results = run(case, "cpu")
    assert all(tensor.isfinite().all() for tensor in results)
    exact = run(in_float64(case), "reference")[0]
    torch.testing.assert_close(results[0].double(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_registration(dtype):
    case = window_case(dtype=dtype)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    operator = torch.ops.magnet_fast.window_attention.default
    torch.library.opcheck(operator, (*arguments, "cpu"))
    grad = torch.randn_like(operator(*arguments, "cpu"))
    backward = torch.ops.magnet_fast.window_attention_backward.default
    torch.library.opcheck(backward, (grad, *arguments, [True] * 3, "cpu"))
