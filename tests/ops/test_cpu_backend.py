"""The C++ kernels for the CPU against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import _cpu, ops

from .cases import outputs_of, weighted_sum, window_case

SIZES = [
    # map, window, heads, d
    ((7, 9), (4, 4), 2, 8),
    ((14, 14), (7, 7), 3, 32),
    ((15, 8), (7, 7), 2, 16),
    ((13, 25), (12, 12), 1, 32),
    ((5, 6), (2, 5), 2, 5),
    ((3, 2), (4, 4), 4, 1),
]
ORDERS = pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])


def run(case, name):
    """Outputs and every gradient."""
    with ops.backend(name):
        return (*case(), *case.gradients())


def assert_agree(case):
    """Both against the reference in float64: the kernel's error is that of float32."""
    exact = window_like(case, torch.float64)
    for ours, theirs, truth in zip(run(case, "cpu"), run(case, "reference"), run(exact, "reference"), strict=True):
        scale = truth.abs().max().clamp_min(1e-3)
        error, baseline = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 4 * baseline + 2e-6 * scale
        assert error <= 2e-5 * scale


def window_like(case, dtype):
    return type(case)(case.operator, [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves], case.arguments)


@ORDERS
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("size", "window", "heads", "d"), SIZES)
def test_equals_the_reference(size, window, heads, d, padding, shifted, pad_first):
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    options = {"size": size, "window": window, "heads": heads, "d": d, "shift": shift}
    assert_agree(window_case(**options, padding=padding, pad_first=pad_first, dtype=torch.float32))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_equals_the_reference_for_any_sizes(data):
    side = st.integers(1, 9)
    window = data.draw(st.tuples(side, side), "window")
    case = window_case(
        batch=data.draw(st.integers(1, 3), "batch"),
        size=data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)), "size"),
        window=window,
        shift=tuple(data.draw(st.integers(0, w - 1), "shift") for w in window),
        heads=data.draw(st.integers(1, 3), "heads"),
        d=data.draw(st.integers(1, 40), "d"),
        padding=data.draw(st.booleans(), "padding"),
        pad_first=data.draw(st.booleans(), "pad_first"),
        dtype=torch.float32,
    )
    assert_agree(case)


@ORDERS
@pytest.mark.parametrize("only", [0, 1, 2], ids=["qkv", "bias_table", "pad_qkv"])
def test_one_gradient_at_a_time(only, pad_first):
    case = window_case(size=(7, 9), window=(4, 4), shift=(2, 1), d=8, pad_first=pad_first, dtype=torch.float32)
    with ops.backend("cpu"):
        all_of_them = case.gradients()
        leaves = [leaf if i == only else leaf.detach() for i, leaf in enumerate(case.leaves)]
        (alone,) = torch.autograd.grad(weighted_sum(case(*leaves)), leaves[only])
    assert torch.equal(alone, all_of_them[only])


def test_views_and_sliced_batches():
    wide = torch.randn(5, 9, 7, 40)
    case = window_case(size=(7, 5), window=(4, 4), shift=(1, 2), d=4, dtype=torch.float32)
    (_, table), options = case.arguments(*case.leaves)
    views = {
        "wider tensor": wide[:2, :7, :5, 8:32],
        "every other image": wide[1:5:2, 1:8, 2:, 4:28],
        "transposed map": wide[:2, :5, :, :24].transpose(1, 2),
        "one image repeated": wide[:1, :7, :5, :24].expand(3, -1, -1, -1),
    }
    for name, view in views.items():
        results = []
        for qkv in (view, view.contiguous()):
            qkv = qkv.detach().requires_grad_()
            with ops.backend("cpu"):
                out = ops.window_attention(qkv, table, **options)
            # A gradient that is a view as well: the output was sliced, transposed or summed.
            results.append((out, *torch.autograd.grad(out.transpose(1, 2)[:, 1:].sum(), [qkv, table])))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs), name


def test_table_and_padding_token_as_views():
    case = window_case(size=(7, 5), window=(4, 4), shift=(1, 2), d=4, dtype=torch.float32)
    qkv, table, padding = case.leaves
    views = [qkv, table.detach().t().contiguous().t(), padding.detach().repeat_interleave(2)[::2]]
    assert not views[1].is_contiguous() and not views[2].is_contiguous()
    with ops.backend("cpu"):
        torch.testing.assert_close(case(*views), case(), rtol=0, atol=0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_whatever_the_threads(threads):
    case = window_case(batch=3, size=(15, 17), window=(7, 7), shift=(3, 3), heads=3, d=16, dtype=torch.float32)
    threads(1)
    expected = run(case, "cpu")
    for count in (1, 2, 3, 8):
        threads(count)
        for ours, theirs in zip(run(case, "cpu"), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_same_bits_twice():
    case = window_case(size=(15, 17), window=(7, 7), shift=(3, 3), d=16, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(case, "cpu"), run(case, "cpu"), strict=True))


@pytest.mark.parametrize("level", _cpu.supported_simd_levels())
def test_every_simd_level(level):
    before = _cpu.simd_level()
    _cpu.set_simd_level(level)
    try:
        assert_agree(window_case(size=(15, 13), window=(7, 7), shift=(3, 2), heads=2, d=24, dtype=torch.float32))
    finally:
        _cpu.set_simd_level(before)


def test_extreme_similarities():
    case = window_case(size=(7, 5), window=(4, 4), shift=(1, 2), d=4, dtype=torch.float32)
    case.leaves[0].data *= 1e3
    assert all(t.isfinite().all() for t in run(case, "cpu"))
    torch.testing.assert_close(run(case, "cpu")[0], run(case, "reference")[0], rtol=1e-3, atol=1e-2)


def test_registration():
    case = window_case(dtype=torch.float32)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    operator = torch.ops.magnet_fast.window_attention.default
    torch.library.opcheck(operator, (*arguments, "cpu"))
    backward = torch.ops.magnet_fast.window_attention_backward.default
    grad = torch.randn_like(operator(*arguments, "cpu"))
    for wanted in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
        torch.library.opcheck(backward, (grad, *arguments, wanted, "cpu"))


def test_compile_fullgraph():
    torch.compiler.reset()
    case = window_case(dtype=torch.float32)
    compiled = torch.compile(lambda *leaves: case(*leaves), fullgraph=True, backend="aot_eager")
    with ops.backend("cpu"):
        assert torch.equal(compiled(*case.leaves)[0], case()[0])
        for ours, theirs in zip(case.gradients(compiled), case.gradients(), strict=True):
            assert torch.equal(ours, theirs)


def test_inference_mode():
    case = window_case(dtype=torch.float32)
    with torch.inference_mode(), ops.backend("cpu"):
        out = case()
    assert torch.equal(out[0], outputs_of(case.registered("cpu")(*case.leaves))[0])
