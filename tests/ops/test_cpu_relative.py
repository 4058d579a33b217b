"""Relative attention's C++ kernels in every dtype, at every SIMD level, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import _cpu, ops
from magnet_fast.ops._view import view

from .cases import assert_low_precision, in_float64, relative_case, run, weighted_sum

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LEVELS = _cpu.supported_simd_levels()
NAMES = ("output", "gradient of qkv", "gradient of rel_height", "gradient of rel_width", "gradient of pad_qkv")
SHAPES = {
    "less than a vector of keys": {"size": (5, 4), "window": (2, 3), "d": 8},
    "odd numbers": {"size": (7, 9), "window": (3, 5), "d": 5},
    "map smaller than the window": {"size": (3, 2), "window": (7, 7), "d": 16},
    "w 14, padded": {"size": (16, 29), "window": (14, 14), "heads": 1, "d": 32, "batch": 1},
    "whole map": {"size": (9, 13), "window": None, "d": 16, "batch": 1},
    # 40 rows of 48 or 40 columns: keys in several blocks, queries in several blocks.
    "blocks of keys": {"size": (40, 33), "window": None, "heads": 1, "d": 20, "batch": 1},
    "a row longer than a block": {"size": (2, 300), "window": None, "heads": 1, "d": 4, "batch": 1},
    "head_dim 72": {"size": (6, 5), "window": (4, 4), "heads": 1, "d": 72},
    "head_dim 1": {"size": (9, 6), "window": (4, 4), "d": 1},
    "one token": {"size": (1, 1), "window": None, "d": 3},
}


@pytest.fixture(autouse=True)
def _restore_level():
    before = _cpu.simd_level()
    yield
    _cpu.set_simd_level(before)


def assert_agrees(case):
    """The kernel against the reference in the same dtype, both measured by the reference in float64."""
    truth = run(in_float64(case), "reference")
    results = zip(NAMES, run(case, "cpu"), run(case, "reference"), truth, strict=False)
    for name, ours, plain, exact in results:
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        if ours.dtype == torch.float32:
            # Logits of 10 and more, whose own error is that many steps, and sums of at most a few thousand terms.
            assert (ours - exact).abs().max() <= 8e-6 * (1 + exact.abs().max()), name
        else:
            assert_low_precision(ours, plain, exact, ours.dtype, name)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(shape, dtype, level):
    _cpu.set_simd_level(level)
    assert_agrees(relative_case(**SHAPES[shape], dtype=dtype))


@LOW
def test_tables_and_padding_token_in_float32(dtype):
    case = relative_case(**SHAPES["odd numbers"], dtype=dtype)
    case.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in case.leaves[1:]]
    truth = run(in_float64(case), "reference")
    for name, ours, plain, exact in zip(NAMES, run(case, "cpu"), run(case, "reference"), truth, strict=True):
        assert ours.dtype == plain.dtype
        assert_low_precision(ours, plain, exact, dtype, name)


def any_case(data, dtype):
    side = st.integers(2, 18)  # over one row or column alone the gradient of a table is zero
    return relative_case(
        batch=data.draw(st.integers(1, 2), "batch"),
        size=data.draw(st.tuples(side, side), "size"),
        window=data.draw(st.none() | st.tuples(st.integers(2, 9), st.integers(2, 9)), "window"),
        heads=data.draw(st.integers(1, 3), "heads"),
        d=data.draw(st.integers(1, 40), "d"),
        padding=data.draw(st.booleans(), "padding"),
        dtype=dtype,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes(data):
    _cpu.set_simd_level(data.draw(st.sampled_from(LEVELS), "level"))
    assert_agrees(any_case(data, data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")))


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_reference(shape):
    case = relative_case(**SHAPES[shape])
    for ours, exact in zip(run(case, "cpu"), run(case, "reference"), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


def assert_alone(case, which):
    """One gradient alone has the bits that it has among all."""
    with ops.backend("cpu"):
        together = case.gradients()[which]
        leaves = [leaf if i == which else leaf.detach() for i, leaf in enumerate(case.leaves)]
        (alone,) = torch.autograd.grad(weighted_sum(case(*leaves)), leaves[which])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("which", range(4), ids=NAMES[1:])
def test_one_gradient_at_a_time(which):
    assert_alone(relative_case(size=(5, 4), window=(3, 3), d=6, dtype=torch.float32), which)


@pytest.mark.parametrize("options", [{"size": (15, 17), "window": (7, 7)}, {"size": (40, 56), "window": None}], ids=str)
def test_same_bits_whatever_the_threads(options):
    """The larger map is shared by the threads query by query."""
    case = relative_case(batch=1, heads=1, d=8, dtype=torch.float32, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(case, "cpu")
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(case, "cpu"), first, strict=True))
    finally:
        torch.set_num_threads(before)


def assert_same_in_views(case):
    """A qkv that is a slice of a wider tensor, odd channels first, height and width exchanged in memory."""
    qkv = case.leaves[0].detach()
    wide = torch.full((qkv.shape[0], qkv.shape[2], qkv.shape[1], qkv.shape[3] + 9), torch.nan, dtype=qkv.dtype)
    sliced = wide.transpose(1, 2)[..., 3:-6]
    sliced.copy_(qkv)
    with ops.backend("cpu"):
        assert torch.equal(case(sliced, *case.leaves[1:])[0], case()[0])


@LOW
def test_views(dtype):
    assert_same_in_views(relative_case(size=(9, 7), window=(4, 4), d=6, dtype=dtype))


def test_broadcast_gradient():
    case = relative_case(dtype=torch.float32)
    with ops.backend("cpu"):
        ones = torch.autograd.grad(case()[0], case.leaves, torch.ones(2, 5, 4, 4))
        summed = torch.autograd.grad(case()[0].sum(), case.leaves)
    assert all(torch.equal(a, b) for a, b in zip(ones, summed, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_extreme_positions(level):
    """Logits of thousands that grow from block to block: the running maximum moves, nothing overflows."""
    _cpu.set_simd_level(level)
    case = relative_case(batch=1, size=(40, 33), window=None, heads=1, d=4, dtype=torch.float32)
    with torch.no_grad():
        case.leaves[1][:] = torch.linspace(300, -300, 79)[:, None]
    exact = run(in_float64(case), "reference")
    for ours, truth in zip(run(case, "cpu"), exact, strict=True):
        # Logits this large carry an error of 2000 * 2^-24 each; so do the weights made of them.
        assert (ours - truth).abs().max() <= 1e-3 * (1 + truth.abs().max())


def assert_bad_stays(case, bad):
    """A bad number spoils the window of 4 x 5 that it is in, and nothing else."""
    leaves = [leaf.detach() for leaf in case.leaves]
    with ops.backend("cpu"):
        clean = case(*leaves)[0]
        leaves[0][0, 3, 4] = bad
        out = case(*leaves)[0]
    assert out[:, :4, :5].isnan().all()
    assert torch.equal(out[:, 4:], clean[:, 4:]) and torch.equal(out[:, :, 5:], clean[:, :, 5:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_window(level, bad):
    _cpu.set_simd_level(level)
    assert_bad_stays(relative_case(batch=1, size=(7, 9), window=(4, 5), d=8, dtype=torch.float32), bad)


# ---- The extension called directly ---------------------------------------------------------------------------------

SIZES, STRIDES = (1, 8, 6, 48), (2304, 288, 48, 1)
GOOD = {
    "qkv": view(torch.zeros(SIZES)),
    "rel_height": (64, (7, 8), (8, 1), 0),
    "rel_width": (64, (9, 8), (8, 1), 0),
    "pad_qkv": None,
    "settings": (2, 4, 5, 0.5),
    "threads": 1,
}
BAD = {
    "qkv: dtype": {"qkv": (64, SIZES, STRIDES, 4)},
    "qkv: no address": {"qkv": (0, SIZES, STRIDES, 0)},
    "qkv: missing": {"qkv": None},
    "qkv: dimensions": {"qkv": (64, SIZES[1:], STRIDES[1:], 0)},
    "qkv: no third": {"qkv": (64, (1, 8, 6, 47), STRIDES, 0)},
    "qkv: strides": {"qkv": (64, SIZES, (2304, -1, 48, 1), 0)},
    "qkv: channels apart": {"qkv": (64, SIZES, (4608, 576, 96, 2), 0)},
    "qkv: not addressable": {"qkv": (64, (2**30, 2**30, 2**30, 48), (0, 0, 0, 1), 0)},
    "rel_height: sizes": {"rel_height": (64, (9, 8), (8, 1), 0)},
    "rel_height: dtype": {"rel_height": (64, (7, 8), (8, 1), 1)},
    "rel_width: strides": {"rel_width": (64, (9, 8), (16, 1), 0)},
    "rel_width: missing": {"rel_width": None},
    "pad_qkv: sizes": {"pad_qkv": (64, (16,), (1,), 0)},
    "heads: 0": {"settings": (0, 4, 5, 0.5)},
    "heads: no divisor": {"settings": (3, 4, 5, 0.5)},
    "window_h": {"settings": (2, 0, 5, 0.5)},
    "window_w": {"settings": (2, 4, 5000, 0.5)},
    "scale": {"settings": (2, 4, 5, float("nan"))},
    "threads": {"threads": 0},
}
BAD_GRADIENTS = {
    "grad_out: missing": {"grad_out": None},
    "grad_qkv: tokens overlap": {"grad_qkv": (64, SIZES, (2304, 288, 47, 1), 0)},
    "grad_rel_height: dtype": {"grad_rel_height": (64, (7, 8), (8, 1), 3)},
    "grad_rel_width: missing": {"grad_rel_width": None},
    "grad_pad_qkv: sizes": {"grad_pad_qkv": (64, (16,), (1,), 0)},
}


@pytest.mark.parametrize("name", BAD)
def test_forward_refuses(name):
    out = torch.full((1, 8, 6, 16), 7.0)
    with pytest.raises(ValueError, match=rf"^{name.partition(':')[0]}: expected"):
        _cpu.relative_attention_forward(**{**GOOD, **BAD[name]}, out=view(out))
    assert (out == 7.0).all()


@pytest.mark.parametrize("name", [*BAD, *BAD_GRADIENTS])
def test_backward_refuses(name):
    gradients = {
        "grad_out": view(torch.zeros(1, 8, 6, 16)),
        "grad_qkv": None,
        "grad_rel_height": (64, (7, 8), (8, 1), 0),
        "grad_rel_width": (64, (9, 8), (8, 1), 0),
        "grad_pad_qkv": None,
    }
    with pytest.raises(ValueError, match=rf"^{name.partition(':')[0]}: expected"):
        _cpu.relative_attention_backward(**{**GOOD, **gradients, **(BAD | BAD_GRADIENTS)[name]})


def test_empty_batch():
    qkv, out = torch.zeros(0, 8, 6, 48), torch.zeros(0, 8, 6, 16)
    tables = torch.zeros(7, 8), torch.zeros(9, 8)
    grads = torch.ones(7, 8), torch.ones(9, 8), torch.ones(48)
    given = {**GOOD, "qkv": view(qkv), "rel_height": view(tables[0]), "rel_width": view(tables[1])}
    _cpu.relative_attention_forward(**given, out=view(out))
    _cpu.relative_attention_backward(
        **given,
        grad_out=view(out),
        grad_qkv=view(torch.zeros_like(qkv)),
        grad_rel_height=view(grads[0]),
        grad_rel_width=view(grads[1]),
        grad_pad_qkv=view(grads[2]),
    )
    assert not any(grad.any() for grad in grads)
