"""The C++ deformable attention for the CPU against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import _cpu, ops

from .cases import Case, assert_low_precision, deformable_case, weighted_sum

NAMES = ("value", "sampling_locations", "attention_weights")


def random_case(
    *, batch=2, shapes=((7, 9), (4, 5), (1, 3)), queries=11, heads=2, d=8, points=4, seed=0, dtype=torch.float32
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    length, levels = sum(h * w for h, w in shapes), len(shapes)
    leaves = [
        torch.randn(batch, length, heads, d, generator=generator),
        torch.rand(batch, queries, heads, levels, points, 2, generator=generator) * 1.4 - 0.2,
        torch.randn(batch, queries, heads, levels, points, generator=generator),
    ]
    return Case(
        "deformable_attention",
        [t.to(dtype).requires_grad_() for t in leaves],
        lambda v, *rest: ((v, list(shapes), *rest), {}),
    )


def run(case, name):
    """The output and every gradient."""
    with ops.backend(name):
        return (*case(), *case.gradients())


def assert_agree(case):
    """Both against the reference in float64: the kernel's error is that of float32."""
    exact = Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)
    results = run(case, "cpu"), run(case, "reference"), run(exact, "reference")
    for name, ours, theirs, truth in zip(("output", *NAMES), *results, strict=True):
        error, baseline = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 4 * baseline + 4e-6 * truth.abs().max().clamp_min(1e-3), name


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    queries=st.integers(1, 20),
    heads=st.integers(1, 4),
    d=st.integers(1, 40),
    points=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(batch, shapes, queries, heads, d, points, seed):
    assert_agree(random_case(batch=batch, shapes=shapes, queries=queries, heads=heads, d=d, points=points, seed=seed))


def assert_low(case):
    """At most twice the error of the reference in the same dtype."""
    dtype = case.leaves[0].dtype
    exact = Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)
    results = run(case, "cpu"), run(case, "reference"), run(exact, "reference")
    for name, leaf, ours, plain, truth in zip(
        ("output", *NAMES), (case.leaves[0], *case.leaves), *results, strict=True
    ):
        assert ours.dtype == leaf.dtype
        assert_low_precision(ours, plain, truth, dtype, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["", "float32 locations"])
def test_low_precision(dtype, wide):
    for d in (3, 20, 32, 64, 70):
        case = random_case(d=d, queries=40, dtype=dtype)
        if wide:
            case.leaves[1] = random_case(d=d, queries=40).leaves[1]
        assert_low(case)


def test_float64():
    """The scalar kernels: as exact as the reference, so that gradients can be checked through them."""
    for d, points in ((1, 1), (5, 3), (40, 4)):
        case = random_case(d=d, points=points, dtype=torch.float64)
        for ours, theirs in zip(run(case, "cpu"), run(case, "reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    case = deformable_case()
    with ops.backend("cpu"):
        assert torch.autograd.gradcheck(case, case.leaves)


def test_far_and_undefined_points():
    case = random_case()
    with torch.no_grad():
        case.leaves[1][0, :4] = torch.tensor([1e9, -1e9, 1e30, -1e30])[:, None, None, None, None]
    assert_agree(case)
    outputs = run(case, "cpu")
    assert all(t.isfinite().all() for t in outputs)


def test_far_and_undefined_points_of_wide_heads_in_bfloat16():
    case = random_case(d=32, dtype=torch.bfloat16)
    with torch.no_grad():
        strange = torch.tensor([1e9, -1e9, 1e30, -1e30, float("inf"), float("nan")])
        case.leaves[1][0, :6] = strange[:, None, None, None, None]
    output = run(case, "cpu")[0].unflatten(-1, (2, 32))
    assert (output[0, :4] == 0).all() and output[0, 4:6].isnan().all()
    assert output[0, 6:].isfinite().all() and output[1].isfinite().all()


@pytest.mark.parametrize("only", range(3), ids=NAMES)
def test_one_gradient_at_a_time(only):
    case = random_case()
    with ops.backend("cpu"):
        all_of_them = case.gradients()
        leaves = [leaf if i == only else leaf.detach() for i, leaf in enumerate(case.leaves)]
        (alone,) = torch.autograd.grad(weighted_sum(case(*leaves)), leaves[only])
    assert torch.equal(alone, all_of_them[only])


def test_views():
    case = random_case()
    value, locations, weights = (leaf.detach() for leaf in case.leaves)
    views = [
        torch.cat([value, value], 2)[:, :, :2],
        locations.transpose(1, 2).contiguous().transpose(1, 2),
        weights[:1].expand(2, -1, -1, -1, -1),
    ]
    for i, view in enumerate(views):
        assert not view.is_contiguous()
        results = []
        for tensor in (view, view.contiguous()):
            given = [leaf.detach() for leaf in case.leaves]
            given[i] = tensor.detach().requires_grad_()
            with ops.backend("cpu"):
                (out,) = case(*given)
            # A gradient that is a view as well: the output was transposed, sliced and summed.
            results.append((out, *torch.autograd.grad(out.transpose(1, 2)[:, 1:].sum(), given[i])))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs), NAMES[i]


def test_same_bits_twice_and_whatever_the_threads():
    case, before = random_case(queries=67, batch=3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(case, "cpu")
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for ours, theirs in zip(run(case, "cpu"), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", _cpu.supported_simd_levels())
def test_every_simd_level(level):
    before = _cpu.simd_level()
    _cpu.set_simd_level(level)
    try:
        for d in (8, 13, 32):
            assert_agree(random_case(d=d))
            for dtype in (torch.bfloat16, torch.float16):
                assert_low(random_case(d=d, dtype=dtype))
    finally:
        _cpu.set_simd_level(before)


def test_registration_and_compile():
    case = deformable_case(dtype=torch.float32)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    operator = torch.ops.magnet_fast.deformable_attention.default
    torch.library.opcheck(operator, (*arguments, "cpu"))
    grad = torch.randn_like(operator(*arguments, "cpu"))
    for wanted in ([True] * 3, [False, True, False]):
        backward = torch.ops.magnet_fast.deformable_attention_backward.default
        torch.library.opcheck(backward, (grad, *arguments, wanted, "cpu"))
    torch.compiler.reset()
    compiled = torch.compile(lambda *leaves: case(*leaves), fullgraph=True, backend="aot_eager")
    with ops.backend("cpu"):
        for ours, theirs in zip(case.gradients(compiled), case.gradients(), strict=True):
            assert torch.equal(ours, theirs)
