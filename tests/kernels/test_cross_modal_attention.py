"""The Triton cross-modal attention, in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from magnet_fast.kernels import _cross_modal_launch

from magnet_fast import ops

from ..ops.cases import CROSS_MODAL_FORMS, Case, random_cross_modal_case
from .agreement import (
    LOW,
    assert_agree,
    assert_each_gradient_alone,
    assert_registered,
    assert_same_bits_twice,
    run,
)

FORMS = pytest.mark.parametrize("form", CROSS_MODAL_FORMS)


def random_case(
    form="shared", *, batch=1, pixels=9, words=5, heads=1, widths=(8, 8, 8), mask="some", dtype=torch.float32
) -> Case:
    """`widths` of one head: similarity, text_value, image_value; `mask`: none, some, or the last sentence is empty."""
    d, dv, dw = widths
    sizes = {"batch": batch, "pixels": pixels, "words": words, "heads": heads, "d": d, "dv": dv, "dw": dw}
    return random_cross_modal_case(form, **sizes, mask=mask, dtype=dtype, seed=pixels + words + d)


@pytest.fixture
def all_wide(monkeypatch):
    """Every head counts as wide, in blocks of 32 channels: the way of the widest heads with few channels."""
    for name, limit in (("_NARROW", 0), ("_NARROW_BACKWARD", 0), ("_WIDE", 512)):
        monkeypatch.setattr(_cross_modal_launch, name, {2: limit, 4: limit})


@FORMS
def test_narrow_heads(form):
    assert_agree(random_case(form, batch=2, heads=2, widths=(8, 12, 6), mask="empty"))


@FORMS
def test_wide_heads(form, all_wide):
    assert_agree(random_case(form, batch=2, widths=(40, 24, 33), mask="empty"))


@pytest.mark.parametrize(
    ("words", "pixels", "d", "heads"),
    [(1, 1, 8, 1), (1, 36, 32, 2), (20, 4, 48, 1), (22, 130, 32, 1), (40, 36, 32, 1), (64, 9, 16, 1)],
)
def test_words_and_pixels(words, pixels, d, heads):
    assert_agree(random_case(words=words, pixels=pixels, heads=heads, widths=(d, d, d), mask="none"))


def test_widths_of_the_models():
    """160 channels are narrow for nobody; 1024 are the widest."""
    assert_agree(random_case("shared", words=20, pixels=36, widths=(160, 160, 160)))
    assert_agree(random_case("pixels only", words=5, pixels=9, widths=(1024, 1024, 0)))
    assert_agree(random_case("words only", words=5, pixels=4, widths=(1024, 0, 1024)))


@pytest.mark.parametrize("wide", [False, True])
def test_several_runs_of_pixels(wide, request):
    if wide:
        request.getfixturevalue("all_wide")
    case = random_case(words=3, pixels=300, mask="some")
    results = assert_agree(case)
    for ours, again in zip(results, run(case, "triton"), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("wide", [False, True])
def test_low_precision(dtype, wide, request):
    if wide:
        request.getfixturevalue("all_wide")
    assert_agree(random_case("shared", words=16, pixels=70, widths=(48, 48, 48), dtype=dtype))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("form", ["shared", "separate"])
def test_each_gradient_alone(form, wide, request):
    if wide:
        request.getfixturevalue("all_wide")
    assert_each_gradient_alone(random_case(form, pixels=5, words=3))


@pytest.mark.parametrize("form", ["shared", "separate"])
def test_the_gradient_of_one_result_alone(form):
    case = random_case(form, pixels=5, words=3)
    for which in (0, 1):
        found = []
        for backend in ("triton", "reference"):
            with ops.backend(backend):
                loss = case()[which].square().sum()
                found.append(torch.autograd.grad(loss, case.leaves, allow_unused=True, materialize_grads=True))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_masked_rows_are_never_read(wide, request):
    if wide:
        request.getfixturevalue("all_wide")
    case, spoiled = (random_case(batch=2, mask="empty") for _ in range(2))
    mask = case.arguments(*case.leaves)[1]["text_mask"]
    for leaf in spoiled.leaves:
        if leaf.shape[1] == mask.shape[1]:
            leaf.data[~mask] = float("nan")
    for ours, theirs in zip(run(spoiled, "triton"), run(case, "triton"), strict=True):
        assert torch.equal(ours, theirs)
        if ours.shape[1] == mask.shape[1]:
            assert not ours[~mask].any() and ours[mask].any()
        else:
            assert ours[0].any() and not ours[1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_undefined_numbers_go_through_as_in_the_reference(value):
    for spoiled in range(3):
        case = random_case(pixels=140, words=4, mask="none")
        leaf = case.leaves[spoiled]
        leaf.data[0, 0 if leaf.shape[1] == 4 else 131, 3] = value
        with ops.backend("triton"):
            ours = case()
        with ops.backend("reference"):
            theirs = case()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_image_has_the_same_bits_whatever_the_batch():
    case = random_case(batch=2, pixels=150, mask="none")
    alone = Case(case.operator, [leaf.detach()[:1].requires_grad_() for leaf in case.leaves], case.arguments)
    with ops.backend("triton"):
        for one, both in zip(alone(), case(), strict=True):
            assert torch.equal(one, both[:1])


def test_views():
    case = random_case(batch=2, heads=2)
    views = {
        "every other channel": lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
        "wider tensor": lambda t: torch.cat([t, t + 1], 2)[..., : t.shape[2]],
        "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "one image repeated": lambda t: t[:1].expand_as(t),
    }
    for name, view in views.items():
        results = []
        for change in (view, lambda t, view=view: view(t).contiguous()):
            leaves = [change(leaf.detach()).requires_grad_() for leaf in case.leaves]
            with ops.backend("triton"):
                outputs = case(*leaves)
                loss = sum(out.transpose(1, 2)[:, 1:].sum() + (2 * out.mT).mT.square().sum() for out in outputs)
                results.append((*outputs, *torch.autograd.grad(loss, leaves)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs), name


def test_same_bits_twice():
    assert_same_bits_twice(random_case("separate", batch=2, pixels=40, words=7))


def test_registration():
    assert_registered(random_case("shared", pixels=4, words=3))


def test_what_is_not_supported_is_said():
    with ops.backend("triton"):
        assert ops.explain("cross_modal_attention", *random_case(words=64).leaves[:3]).chosen == "triton"
        with pytest.raises(ops.BackendError, match="65 words are not supported, 64 at most"):
            random_case("pixels only", words=65)()
        with pytest.raises(ops.BackendError, match="1032 channels of a head are not supported, 1024 at most"):
            random_case("pixels only", widths=(1032, 8, 0))()
