"""The Triton deformable attention, both forms, in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from magnet_fast.kernels import _deformable_value

from magnet_fast import ops

from ..ops.cases import Case, deformable_case, fused_deformable_case
from ..ops.cases import random_deformable_case as random_case
from .agreement import (
    LOW,
    assert_agree,
    assert_each_gradient_alone,
    assert_registered,
    assert_same_bits_twice,
    run,
)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"batch": 2, "heads": 3, "d": 6, "queries": 7, "points": 3},
        {"maps": [(3, 5)], "points": 1, "d": 72, "queries": 2},
        {"maps": [(1, 1), (2, 1)], "queries": 1, "d": 32},
    ],
)
@pytest.mark.parametrize("form", ["plain", "fused", "boxes"])
def test_equals_the_reference(form, shape):
    assert_agree(random_case(form=form, **shape))


@pytest.mark.parametrize("reference", [("Q",), ("B", "Q")])
@pytest.mark.parametrize("form", ["fused", "boxes"])
def test_reference_points_of_all_levels_or_images(form, reference):
    assert_agree(random_case(form=form, reference=reference, batch=2, maps=[(3, 2), (2, 2)], queries=3, points=2))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_low_precision(form, dtype):
    assert_agree(random_case(form=form, heads=2, d=16, dtype=dtype))


def test_low_precision_locations():
    assert_agree(random_case(dtype=torch.bfloat16, places=torch.bfloat16, maps=[(4, 4), (2, 2)]))


def test_many_queries_on_small_maps():
    """The bins are split by query; many points read one pixel."""
    assert_agree(random_case(queries=150, maps=[(2, 2), (1, 1)], d=4, spread=0.2))


def test_the_order_in_which_points_were_counted_does_not_matter(monkeypatch):
    """On a GPU atomics number the points of a bin as they come: here the other way round."""
    case = random_case(queries=60, maps=[(2, 2), (1, 1)], d=4, form="fused")
    expected = run(case, "triton")
    launch, reversed_bins = _deformable_value._list_kernel, []

    class Reversed:
        def __getitem__(self, grid):
            def run_reversed(**arguments):
                bins, numbers = arguments["bins_ptr"].long(), arguments["numbers_ptr"]
                counts = torch.gather(arguments["counts_ptr"], 1, bins.clamp_min(0))
                reversed_bins.append(int((counts > 1).sum()))
                numbers.copy_(torch.where(bins >= 0, counts - 1 - numbers, numbers))
                launch[grid](**arguments)

            return run_reversed

    monkeypatch.setattr(_deformable_value, "_list_kernel", Reversed())
    for ours, theirs in zip(run(case, "triton"), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert reversed_bins and reversed_bins[0] > 10


@pytest.mark.parametrize("form", ["plain", "fused", "boxes"])
def test_each_gradient_alone(form):
    assert_each_gradient_alone(random_case(form=form, maps=[(3, 2), (2, 2)], queries=3, points=2))


def test_points_outside_of_the_maps():
    case = random_case()
    for far in (3.0, -2.0, 1e30, -1e30, float("inf"), float("nan")):
        case.leaves[1].data.fill_(far)
        results = run(case, "triton")
        assert not any(result.any() for result in results), far


def test_undefined_numbers_reach_what_they_touch():
    case = random_case(maps=[(4, 4)], points=2)
    case.leaves[1].data.fill_(0.125)  # the centre of the upper left pixel
    for value in (float("nan"), float("inf")):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in case.leaves]
        leaves[0].data[0, 15] = value  # not touched
        leaves[0].data[0, 0, 0, 3] = value
        with ops.backend("triton"):
            (out,) = case(*leaves)
            (grad,) = torch.autograd.grad(out[..., 3].sum() * value, leaves[0])
        assert out[..., :3].isfinite().all() and not out[..., 3].isfinite().any()
        assert not grad[0, 0, 0, 3].isfinite() and grad[0, 8:].eq(0).all()


def test_views():
    case = random_case(batch=2, heads=2, d=4, form="fused")
    value, reference, offsets, logits = (leaf.detach() for leaf in case.leaves)
    both = torch.cat([offsets.flatten(3), logits.flatten(3)], -1)  # of one wider tensor
    count = offsets[0, 0, 0].numel()
    views = [
        torch.cat([value, value], -1)[..., : value.shape[-1]],
        reference[:1].expand_as(reference),
        both[..., :count].unflatten(3, offsets.shape[3:]),
        both[..., count:].unflatten(3, logits.shape[3:]),
    ]
    assert not any(view.is_contiguous() for view in views)
    others = [
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        reference.repeat_interleave(2, -1)[..., ::2],
        offsets.transpose(3, 4).contiguous().transpose(3, 4),
        logits.transpose(3, 4).contiguous().transpose(3, 4),
    ]
    for leaves in (views, others):
        results = []
        for change in (lambda t: t, torch.Tensor.contiguous):
            changed = Case(case.operator, [change(leaf).requires_grad_() for leaf in leaves], case.arguments)
            results.append(run(changed, "triton"))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_same_bits_twice():
    assert_same_bits_twice(random_case(batch=2, queries=20))


@pytest.mark.parametrize("make", [deformable_case, fused_deformable_case])
def test_registration(make):
    assert_registered(make(dtype=torch.float32))


def test_what_is_not_supported_is_said():
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="129 points of a query are not supported, 128"):
        random_case(maps=[(1, 1)] * 3, points=43)()
