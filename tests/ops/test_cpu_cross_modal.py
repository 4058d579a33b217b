"""The C++ cross-modal attention for the CPU against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import _cpu, ops

from .cases import (
    CROSS_MODAL_FORMS,
    Case,
    all_cases,
    assert_low_precision,
    cross_modal_case,
    random_cross_modal_case,
    weighted_sum,
)

FORMS = pytest.mark.parametrize("form", CROSS_MODAL_FORMS)
NAMES = ("image_query", "text_key", "text_value", "text_query", "image_key", "image_value")
LOW = [torch.bfloat16, torch.float16]


def run(case, name):
    """The outputs and every gradient."""
    with ops.backend(name):
        return (*case(), *case.gradients())


def in_float64(case):
    return Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)


def assert_agree(case):
    """Both against the reference in float64: the kernel's error is that of its dtype."""
    dtype = case.leaves[0].dtype
    results = run(case, "cpu"), run(case, "reference"), run(in_float64(case), "reference")
    for i, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == dtype and ours.is_contiguous()
        if dtype in LOW:
            assert_low_precision(ours, theirs, truth, dtype, f"result {i}")
            continue
        step = torch.finfo(dtype).eps
        error, baseline = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 4 * baseline + 32 * step * truth.abs().max().clamp_min(1e-2), f"result {i}"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(sorted(CROSS_MODAL_FORMS)),
    batch=st.integers(1, 3),
    pixels=st.one_of(st.integers(1, 70), st.sampled_from([144, 145, 300])),
    words=st.one_of(st.integers(1, 24), st.just(130)),
    heads=st.integers(1, 3),
    d=st.integers(1, 40),
    dv=st.integers(1, 70),
    dw=st.integers(1, 70),
    mask=st.sampled_from(["none", "some", "empty"]),
    dtype=st.sampled_from([torch.float32, torch.float64, *LOW]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(form, batch, pixels, words, heads, d, dv, dw, mask, dtype, seed):
    assert_agree(
        random_cross_modal_case(
            form,
            batch=batch,
            pixels=pixels,
            words=words,
            heads=heads,
            d=d,
            dv=dv,
            dw=dw,
            mask=mask,
            dtype=dtype,
            seed=seed,
        )
    )


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_the_models_shapes(form, dtype):
    assert_agree(
        random_cross_modal_case(form, batch=1, pixels=225, words=20, heads=1, d=512, dv=512, dw=512, dtype=dtype)
    )
    assert_agree(
        random_cross_modal_case(form, batch=1, pixels=3600, words=20, heads=4, d=32, dv=32, dw=32, dtype=dtype)
    )
    assert_agree(random_cross_modal_case(form, batch=2, pixels=9, words=20, heads=1, d=64, dv=64, dw=64, dtype=dtype))


@FORMS
def test_gradients_in_float64(form):
    for mask in ("none", "empty"):
        case = random_cross_modal_case(form, pixels=5, words=3, d=2, dv=3, dw=1, mask=mask, dtype=torch.float64)
        with ops.backend("cpu"):
            assert torch.autograd.gradcheck(case, case.leaves)


@FORMS
@pytest.mark.parametrize("level", _cpu.supported_simd_levels())
def test_every_simd_level(form, level):
    before = _cpu.simd_level()
    _cpu.set_simd_level(level)
    try:
        for dtype in (torch.float32, *LOW):
            assert_agree(random_cross_modal_case(form, pixels=150, words=20, d=24, dv=16, dw=48, dtype=dtype))
            assert_agree(random_cross_modal_case(form, pixels=19, words=5, d=13, dv=3, dw=37, dtype=dtype))
    finally:
        _cpu.set_simd_level(before)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_masked_rows_are_never_read(form, dtype):
    case, spoiled = (random_cross_modal_case(form, mask="empty", dtype=dtype) for _ in range(2))
    mask = case.arguments(*case.leaves)[1]["text_mask"]
    for leaf in spoiled.leaves:
        if leaf.shape[1] == mask.shape[1]:
            leaf.data[~mask] = float("nan")
    for ours, theirs in zip(run(spoiled, "cpu"), run(case, "cpu"), strict=True):
        assert torch.equal(ours, theirs)
        if ours.shape[1] == mask.shape[1]:
            assert not ours[~mask].any() and ours[mask].any()
        else:
            assert ours[0].any() and not ours[1].any()


@FORMS
def test_no_sentence_has_words(form):
    case = cross_modal_case(form, mask=torch.zeros(2, 3, dtype=torch.bool), dtype=torch.float32)
    assert not any(result.any() for result in run(case, "cpu"))


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_undefined_numbers_go_through_as_in_the_reference(form, value):
    count = len(random_cross_modal_case(form).leaves)
    # One tensor at a time. Long enough for several runs of pixels, of which one holds the number.
    for spoiled in range(count):
        case = random_cross_modal_case(form, batch=1, pixels=200, words=4, heads=1, d=8, mask="none")
        leaf = case.leaves[spoiled]
        leaf.data[0, 0 if leaf.shape[1] == 4 else 150, 3] = value
        with ops.backend("cpu"):
            ours = case()
        with ops.backend("reference"):
            theirs = case()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        if value != value:
            assert not all(out.isfinite().all() for out in theirs)


@FORMS
def test_strong_similarities(form):
    case = random_cross_modal_case(form, pixels=300, words=20, mask="none")
    for leaf in case.leaves:
        leaf.data *= 30
    for ours, theirs in zip(run(case, "cpu")[:2], run(in_float64(case), "reference")[:2], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-1)


@FORMS
def test_one_gradient_at_a_time(form):
    case = random_cross_modal_case(form, pixels=150)
    outputs = case()
    for chosen in itertools.product([False, True], repeat=len(outputs)):
        # The gradient of one output alone, too: what nothing flows into is zero.
        if not any(chosen):
            continue

        def loss(*leaves, case=case, chosen=chosen):
            return weighted_sum(tuple(out for out, want in zip(case(*leaves), chosen, strict=True) if want))

        with ops.backend("cpu"):
            every = torch.autograd.grad(loss(*case.leaves), case.leaves, allow_unused=True, materialize_grads=True)
            for only in range(len(case.leaves)):
                leaves = [leaf if i == only else leaf.detach() for i, leaf in enumerate(case.leaves)]
                (alone,) = torch.autograd.grad(loss(*leaves), leaves[only])
                assert torch.equal(alone, every[only])
        with ops.backend("reference"):
            expected = torch.autograd.grad(loss(*case.leaves), case.leaves, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(every, expected, rtol=1e-4, atol=1e-5)


@FORMS
def test_views(form):
    case = random_cross_modal_case(form)
    views = {
        "every other channel": lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
        "wider tensor": lambda t: torch.cat([t, t + 1], 2)[..., : t.shape[2]],
        "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "one image repeated": lambda t: t[:1].expand_as(t),
        "one row repeated": lambda t: t[:, :1].expand_as(t),
    }
    for name, view in views.items():
        results = []
        for change in (view, lambda t, view=view: view(t).contiguous()):
            leaves = [change(leaf.detach()).requires_grad_() for leaf in case.leaves]
            with ops.backend("cpu"):
                outputs = case(*leaves)
                # Gradients that are views as well: the outputs were transposed, sliced and summed.
                loss = sum(out.transpose(1, 2)[:, 1:].sum() + (2 * out.mT).mT.square().sum() for out in outputs)
                results.append((*outputs, *torch.autograd.grad(loss, leaves)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs), name


def test_mask_as_a_view():
    case = random_cross_modal_case("shared", words=6)
    args, options = case.arguments(*case.leaves)
    mask = options["text_mask"]
    with ops.backend("cpu"):
        expected = ops.cross_modal_attention(*args, **options)
        view = mask.t().contiguous().t()
        assert not view.is_contiguous()
        found = ops.cross_modal_attention(*args, **{**options, "text_mask": view})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice_and_whatever_the_threads(form, dtype):
    before = torch.get_num_threads()
    shapes = [{"batch": 1, "pixels": 333, "heads": 1, "d": 64}, {"batch": 3, "pixels": 150, "heads": 3, "d": 32}]
    try:
        for shape in shapes:
            case = random_cross_modal_case(form, words=11, dv=32, dw=32, dtype=dtype, **shape)
            torch.set_num_threads(1)
            expected = run(case, "cpu")
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for ours, theirs in zip(run(case, "cpu"), expected, strict=True):
                    assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_images_of_a_batch_do_not_touch():
    """More images than the backward pass takes at a time."""
    case = random_cross_modal_case("separate", batch=70, pixels=3, words=2, heads=1)
    assert_agree(case)


@pytest.mark.parametrize("name", [name for name in all_cases() if name.startswith("cross-modal")])
def test_registration(name):
    case = all_cases(torch.float32)[name]
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.normalised()]
    forward = torch.ops.magnet_fast.cross_modal_attention.default
    backward = torch.ops.magnet_fast.cross_modal_attention_backward.default
    torch.library.opcheck(forward, (*arguments, "cpu"))
    grads = [torch.randn_like(out) if out.numel() else None for out in forward(*arguments, "cpu")]
    wanted = [argument is not None for argument in arguments[:6]]
    last = 5 - wanted[::-1].index(True)
    for choice in (wanted, [i == last for i in range(6)]):
        torch.library.opcheck(backward, (*grads, *arguments, choice, "cpu"))
    nothing = backward(None, None, *arguments, wanted, "cpu")
    for want, tensor, grad in zip(wanted, arguments, nothing, strict=False):
        assert grad.shape == (tensor.shape if want else (0,)) and not grad.any()


def test_compile_fullgraph():
    torch.compiler.reset()
    for form in ("separate", "words only"):
        case = random_cross_modal_case(form)
        compiled = torch.compile(lambda *leaves, case=case: case(*leaves), fullgraph=True, backend="aot_eager")
        with ops.backend("cpu"):
            for ours, theirs in zip(case.gradients(compiled), case.gradients(), strict=True):
                assert torch.equal(ours, theirs)


def test_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16), ops.backend("cpu"):
        outputs = random_cross_modal_case()()
    assert all(out.dtype == torch.bfloat16 for out in outputs)
