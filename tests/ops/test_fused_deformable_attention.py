"""fused_deformable_attention: the formula, transformers' Deformable DETR, every form of reference points, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from magnet_fast import _cpu, ops

from . import loops
from .cases import Case, assert_low_precision, weighted_sum

FORMS = ("Q2", "BQ2", "BQL2", "Q4", "BQ4", "BQL4")
NAMES = ("value", "reference_points", "sampling_offsets", "attention_logits")
SHAPES = ((3, 4), (2, 1))


def fused_case(form="BQL2", *, batch=2, shapes=SHAPES, queries=3, heads=2, d=3, points=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    levels, length = len(shapes), sum(h * w for h, w in shapes)
    extent = {"B": batch, "Q": queries, "L": levels, "2": 2, "4": 4}
    reference = torch.rand([extent[c] for c in form], generator=generator, dtype=torch.float64) * 1.2 - 0.1
    leaves = [
        normal(batch, length, heads, d),
        reference,
        normal(batch, queries, heads, levels, points, 2),  # some points lie outside of the maps
        normal(batch, queries, heads, levels, points),
    ]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return Case("fused_deformable_attention", leaves, lambda v, *rest: ((v, list(shapes), *rest), {}))


def plainly(shapes, value, reference, offsets, logits):
    """Softmax and locations as the papers write them; a product for every number."""
    batch, queries, heads, levels, points, _ = offsets.shape
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    while reference.dim() < 4:
        reference = reference[None] if reference.dim() == 2 else reference[:, :, None]
    reference = reference[:, :, None, :, None].expand(batch, queries, heads, levels, points, -1)
    if reference.shape[-1] == 2:
        sides = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype)
        locations = reference + offsets / sides[:, None]
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    return locations, weights


def run(case, backend):
    """The output and every gradient."""
    with ops.backend(backend):
        return (*case(), *case.gradients())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_loops(form, backend):
    case = fused_case(form)
    locations, weights = plainly(SHAPES, *case.leaves)
    expected = loops.deformable_attention(case.leaves[0], SHAPES, locations, weights)
    results = run(case, backend)
    torch.testing.assert_close(results[0], expected, rtol=1e-11, atol=1e-12)
    grads = torch.autograd.grad(weighted_sum((expected,)), case.leaves)
    torch.testing.assert_close(results[1:], grads, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_equals_transformers(backend, coordinates):
    torch.manual_seed(0)
    shapes, queries = [(7, 9), (4, 5), (2, 3)], 13
    config = DeformableDetrConfig(d_model=32, num_feature_levels=3)
    module = DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    length = sum(h * w for h, w in shapes)
    hidden, memory = torch.randn(2, queries, 32).double(), torch.randn(2, length, 32).double()
    reference = torch.rand(2, queries, 3, coordinates).double()
    theirs = module(
        hidden,
        encoder_hidden_states=memory,
        reference_points=reference,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
        level_start_index=torch.tensor([0, 63, 83]),
    )[0]
    with ops.backend(backend):
        ours = ops.fused_deformable_attention(
            module.value_proj(memory).view(2, length, 4, 8),
            shapes,
            reference,
            module.sampling_offsets(hidden).view(2, queries, 4, 3, 3, 2),
            module.attention_weights(hidden).view(2, queries, 4, 3, 3),
        )
    torch.testing.assert_close(module.output_proj(ours), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_kernel(form):
    # Not on a kink: bilinear interpolation has no derivative where a point meets a row or column of pixels.
    case = fused_case(form, queries=2, d=2, seed=3)
    with ops.backend("cpu"):
        assert torch.autograd.gradcheck(case, case.leaves)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    queries=st.integers(1, 20),
    heads=st.integers(1, 4),
    d=st.integers(1, 40),
    points=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_float32_kernel_equals_the_reference(form, batch, shapes, queries, heads, d, points, seed):
    sizes = {"batch": batch, "shapes": shapes, "queries": queries, "heads": heads, "d": d, "points": points}
    assert_agree(fused_case(form, **sizes, seed=seed, dtype=torch.float32))


def assert_agree(case):
    """Kernel and reference against the reference in float64: the kernel's error is that of float32."""
    exact = Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)
    results = run(case, "cpu"), run(case, "reference"), run(exact, "reference")
    for name, ours, theirs, truth in zip(("output", *NAMES), *results, strict=True):
        error, baseline = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 4 * baseline + 6e-6 * truth.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("level", _cpu.supported_simd_levels())
def test_every_simd_level(level):
    before = _cpu.simd_level()
    _cpu.set_simd_level(level)
    try:
        for form, points, d in (("Q2", 4, 8), ("BQL2", 3, 13), ("BQL4", 16, 32), ("BQ4", 1, 70)):
            assert_agree(fused_case(form, points=points, d=d, queries=37, dtype=torch.float32))
        for dtype in (torch.bfloat16, torch.float16):
            for d in (20, 64):
                assert_low(dtype, d=d)
    finally:
        _cpu.set_simd_level(before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [(), ("reference_points",), NAMES[1:], ("attention_logits",)], ids=len)
def test_low_precision(dtype, wide, backend):
    for d in (20, 32):
        assert_low(dtype, wide, backend, d)


def assert_low(dtype, wide=(), backend="cpu", d=20):
    """Against the formula in the low precision; the tensors named in `wide` stay float32."""
    case = fused_case("BQL2", d=d, queries=17, dtype=dtype)
    case.leaves = [
        leaf.detach().to(torch.float32 if name in wide else dtype).requires_grad_()
        for name, leaf in zip(NAMES, case.leaves, strict=True)
    ]
    truth = Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)
    low = [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves]
    locations, weights = plainly(SHAPES, *low)
    plain = ops.deformable_attention(low[0], SHAPES, locations, weights)
    grads = torch.autograd.grad(weighted_sum((plain,)), low)
    ours, exact = run(case, backend), run(truth, "reference")
    assert [t.dtype for t in ours] == [dtype, *(leaf.dtype for leaf in case.leaves)]
    for name, a, b, c in zip(("output", *NAMES), ours, (plain, *grads), exact, strict=True):
        assert_low_precision(a, b, c, dtype, name)


def test_views_of_one_wider_tensor():
    """Offsets and logits as slices of one product, and layouts that have to be copied."""
    case = fused_case("Q2", queries=20, heads=4, d=8, points=4, dtype=torch.float32)
    value, reference, offsets, logits = (leaf.detach() for leaf in case.leaves)
    together = torch.cat([offsets.flatten(2), logits.flatten(2)], -1)
    views = (
        torch.cat([value, value], 2)[:, :, :4],
        reference.t().contiguous().t(),
        together[..., : offsets[0, 0].numel()].view(offsets.shape),
        together[..., offsets[0, 0].numel() :].view(logits.shape),
    )
    odd = (
        value.transpose(2, 3).contiguous().transpose(2, 3),
        reference[:, None].expand(-1, 2, -1)[:, 0],
        offsets.transpose(3, 4).contiguous().transpose(3, 4),
        logits.transpose(1, 4).contiguous().transpose(1, 4),
    )
    with ops.backend("cpu"):
        expected = run(case, "cpu")
        for given_views in (views, odd):
            leaves = [view.detach().requires_grad_() for view in given_views]
            (out,) = case(*leaves)
            assert torch.equal(out, expected[0])
            for ours, theirs in zip(torch.autograd.grad(weighted_sum((out,)), leaves), expected[1:], strict=True):
                assert torch.equal(ours, theirs)


def test_broadcast_logits():
    case = fused_case("BQ2", dtype=torch.float32)
    leaves = [leaf.detach() for leaf in case.leaves]
    leaves[3] = leaves[3][:1, :1].expand_as(leaves[3])
    with ops.backend("cpu"):
        torch.testing.assert_close(case(*leaves), case(*leaves[:3], leaves[3].contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["Q2", "BQL4"])
@pytest.mark.parametrize("only", range(4), ids=NAMES)
def test_one_gradient_at_a_time(only, form):
    case = fused_case(form, queries=50, d=16, dtype=torch.float32)
    with ops.backend("cpu"):
        all_of_them = case.gradients()
        leaves = [leaf if i == only else leaf.detach() for i, leaf in enumerate(case.leaves)]
        (alone,) = torch.autograd.grad(weighted_sum(case(*leaves)), leaves[only])
    assert torch.equal(alone, all_of_them[only])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form, batch, heads", [("Q2", 1, 1), ("Q4", 3, 2), ("BQL2", 2, 8)])
def test_same_bits_twice_and_whatever_the_threads(form, batch, heads, dtype):
    case = fused_case(form, queries=200, batch=batch, heads=heads, d=16, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(case, "cpu")
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for ours, theirs in zip(run(case, "cpu"), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers(strange):
    case = fused_case(queries=4, dtype=torch.float32)
    leaves = [leaf.detach().clone() for leaf in case.leaves]
    leaves[3][0, 1, 0, 0, 0] = strange
    leaves[3][1, 2] = strange
    results = []
    for backend in ("cpu", "reference"):
        with ops.backend(backend):
            results.append(case(*leaves)[0])
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0].isnan().any() and results[0].isfinite().any()


def test_autocast():
    case = fused_case("Q2", dtype=torch.float32, queries=9)
    exact = case()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case()[0]
        low = case(*(leaf if i in (0, 1) else leaf.bfloat16() for i, leaf in enumerate(case.leaves)))[0]
    assert out.dtype == low.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.1)
    loss = weighted_sum((out.float(),))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, case.leaves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_case()()[0].dtype == torch.float64


def test_registration():
    case = fused_case(dtype=torch.float32)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    operator = torch.ops.magnet_fast.fused_deformable_attention.default
    torch.library.opcheck(operator, (*arguments, "cpu"))
    grad = torch.randn_like(operator(*arguments, "cpu"))
    for wanted in ([True] * 4, [False, True, False, False]):
        backward = torch.ops.magnet_fast.fused_deformable_attention_backward.default
        torch.library.opcheck(backward, (grad, *arguments, wanted, "cpu"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compile(backend):
    torch.compiler.reset()
    case = fused_case(dtype=torch.float32)
    compiled = torch.compile(lambda *leaves: case(*leaves), fullgraph=True, backend="aot_eager")
    with ops.backend(backend):
        torch.testing.assert_close(case.gradients(compiled), case.gradients())


def test_missing_output_gradient_is_zero():
    case = fused_case(dtype=torch.float32)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    backward = torch.ops.magnet_fast.fused_deformable_attention_backward.default
    grads = backward(None, *arguments, [True, False, True, True], "cpu")
    assert [tuple(g.shape) for g in grads[:2]] == [tuple(arguments[0].shape), (0,)]
    assert not any(g.any() for g in grads)


VALUE, OFFSETS = torch.zeros(2, 10, 2, 3), torch.zeros(2, 5, 2, 2, 4, 2)
GOOD = {
    "value": VALUE,
    "spatial_shapes": [(2, 3), (2, 2)],
    "reference_points": torch.zeros(5, 2),
    "sampling_offsets": OFFSETS,
    "attention_logits": OFFSETS[..., 0],
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "value: expected a tensor", {"value": None}),
        (TypeError, "reference_points: expected a tensor", {"reference_points": [0.5, 0.5]}),
        (ValueError, "reference_points: expected 3 dimensions", {"reference_points": torch.zeros(2)}),
        (ValueError, r"reference_points: expected shape \(5, 2\)", {"reference_points": torch.zeros(4, 2)}),
        (ValueError, r"reference_points: expected shape \(5, 2\)", {"reference_points": torch.zeros(5, 3)}),
        (ValueError, r"reference_points: expected shape \(2, 5, 4\)", {"reference_points": torch.zeros(1, 5, 4)}),
        (ValueError, r"reference_points: .* \(2, 5, 2, 2\)", {"reference_points": torch.zeros(2, 5, 3, 2)}),
        (TypeError, "reference_points: expected dtype float32", {"reference_points": torch.zeros(5, 2).half()}),
        (ValueError, "spatial_shapes: .* 12 positions together, value has 10", {"spatial_shapes": [(2, 3), (2, 3)]}),
        (ValueError, "sampling_offsets: expected shape .* 3 levels", {"spatial_shapes": [(2, 3), (1, 2), (1, 2)]}),
        (ValueError, "sampling_offsets: expected 6 dimensions", {"sampling_offsets": OFFSETS[0]}),
        (ValueError, "attention_logits: expected shape", {"attention_logits": OFFSETS[..., :3, 0]}),
        (TypeError, "attention_logits: expected dtype float32", {"attention_logits": OFFSETS[..., 0].half()}),
        (TypeError, "sampling_offsets: expected dtype float32", {"sampling_offsets": OFFSETS.double()}),
        (ValueError, "attention_logits: expected the device", {"attention_logits": OFFSETS[..., 0].to("meta")}),
    ],
)  # fmt: skip
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.fused_deformable_attention(**{**GOOD, **change})


def test_it_is_chosen():
    assert ops.explain("fused_deformable_attention", *GOOD.values()).chosen == "cpu"
