"""Deformable attention's CUDA kernels of both forms, emulated, against the reference."""

import pytest
import torch

from magnet_fast.ops import _cpu_deformable, _cuda_backend, _cuda_deformable
from magnet_fast.ops._view import view

from ..ops.cases import Case, random_deformable_case, weighted_sum
from .agreement import assert_agrees, results

pytestmark = pytest.mark.slow

LOW = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
FORMS = pytest.mark.parametrize("form", ["plain", "fused", "boxes"])
SHAPES = {
    "heads of 32": {"batch": 2, "heads": 2, "d": 32, "queries": 7},
    "heads of 5": {"batch": 2, "heads": 3, "d": 5, "queries": 7, "points": 3},
    "one point, few lanes": {"maps": [(3, 5)], "points": 1, "d": 8, "queries": 2},
}
SMALL = {"maps": [(3, 2), (2, 2)], "queries": 3, "heads": 2, "points": 3}


@FORMS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(emulated, shape, dtype, form):
    """A third of the points lie outside of their maps."""
    assert_agrees(random_deformable_case(form=form, **SHAPES[shape], dtype=dtype), emulated, dtype)


OTHERS = {
    "wider than a warp reads": {"maps": [(2, 3)], "d": 264, "queries": 2, "points": 2},
    "the same, not aligned": {"maps": [(2, 3)], "d": 71, "queries": 2, "points": 2},
    "256 points": {"maps": [(1, 2)] * 16, "d": 16, "queries": 2, "points": 16},
    "many queries on small maps": {"maps": [(2, 2), (1, 1)], "d": 8, "queries": 150, "spread": 0.2},
}


@pytest.mark.parametrize("shape", OTHERS)
def test_shapes(emulated, shape):
    assert_agrees(random_deformable_case(form="fused", **OTHERS[shape], dtype=LOW), emulated, LOW)


@pytest.mark.parametrize("reference", [("Q",), ("B", "Q")])
@pytest.mark.parametrize("form", ["fused", "boxes"])
def test_reference_points_of_all_levels_or_images(emulated, form, reference):
    case = random_deformable_case(form=form, reference=reference, batch=2, **SMALL)
    assert_agrees(case, emulated, torch.float32)


@pytest.mark.parametrize("narrow", range(1, 4), ids=["reference_points", "sampling_offsets", "attention_logits"])
def test_each_tensor_in_its_own_precision(emulated, narrow):
    case = random_deformable_case(form="boxes", **SMALL, dtype=LOW)
    leaves = [case.leaves[0], *(leaf.detach().float() for leaf in case.leaves[1:])]
    leaves[narrow] = leaves[narrow].to(LOW)
    assert_agrees(
        Case(case.operator, [leaf.detach().requires_grad_() for leaf in leaves], case.arguments), emulated, LOW
    )


def test_low_precision_locations(emulated):
    assert_agrees(random_deformable_case(**SMALL, dtype=LOW, places=LOW), emulated, LOW)


@FORMS
def test_one_gradient_at_a_time(emulated, form):
    case = random_deformable_case(form=form, **SMALL, dtype=LOW)
    together = results(case, "cuda")[1:]
    for which, expected in enumerate(together):
        leaves = [leaf if i == which else leaf.detach() for i, leaf in enumerate(case.leaves)]
        (alone,) = torch.autograd.grad(weighted_sum(case.registered("cuda")(*leaves)), leaves[which])
        assert torch.equal(alone, expected), which


def test_the_workspace(emulated, monkeypatch):
    """What lies in it does not matter, and nothing is written behind it."""
    case, made = random_deformable_case(form="boxes", batch=2, d=8, **SMALL, dtype=LOW), []
    expected = results(case, "cuda")

    def workspace(size, like):
        made.append(torch.full((size + 256,), 0xAB, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(_cuda_backend, "workspace", workspace)
    assert all(torch.equal(a, b) for a, b in zip(results(case, "cuda"), expected, strict=True))
    assert made and all((memory[-256:] == 0xAB).all() for memory in made)


def test_points_outside_of_the_maps(emulated):
    case = random_deformable_case(**SMALL)
    for far in (3.0, -2.0, 1e30, -1e30, float("inf"), float("nan")):
        case.leaves[1].data.fill_(far)
        assert not any(result.any() for result in results(case, "cuda")), far


def test_undefined_numbers_reach_only_what_they_touch(emulated):
    case = random_deformable_case(maps=[(4, 4)], points=2)
    case.leaves[1].data.fill_(0.125)  # the centre of the upper left position
    case.leaves[2].data[0, 1, 0, 0, 1] = torch.nan  # of a point that lies outside
    case.leaves[1].data[0, 1, 0, 0, 1] = 7.0
    case.leaves[0].data[0, 15] = torch.inf  # not touched
    case.leaves[0].data[0, 0, 0, 3] = torch.inf
    out = case.registered("cuda")(*case.leaves)[0]
    assert out[..., :3].isfinite().all() and out[..., 4:].isfinite().all() and not out[..., 3].isfinite().any()
    (grad,) = torch.autograd.grad(weighted_sum((out[..., :3],)), case.leaves[0])
    assert grad.isfinite().all() and grad[0, 0].any() and not grad[0, 8:].any()


def test_views(emulated):
    """A slice of a wider tensor, points of one wider tensor, reference points that are repeated."""
    case = random_deformable_case(form="fused", batch=2, d=8, **SMALL, dtype=LOW)
    value, reference, offsets, logits = (leaf.detach() for leaf in case.leaves)
    wide = torch.full((*value.shape[:3], 24), torch.nan, dtype=LOW)
    wide[..., 8:16] = value
    both = torch.cat([offsets.flatten(3), logits.float().flatten(3)], -1)
    count = offsets[0, 0, 0].numel()
    views = [
        wide[..., 8:16],
        reference[:1].expand_as(reference),
        both[..., :count].unflatten(3, offsets.shape[3:]),
        both[..., count:].unflatten(3, logits.shape[3:]),
    ]
    others = [
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        reference.repeat_interleave(2, -1)[..., ::2],
        offsets.transpose(3, 4).contiguous().transpose(3, 4),
        logits.transpose(3, 4).contiguous().transpose(3, 4),
    ]
    for leaves in (views, others):
        assert not any(leaf.is_contiguous() for leaf in leaves)
        given = [
            results(Case(case.operator, [change(leaf).requires_grad_() for leaf in leaves], case.arguments), "cuda")
            for change in (lambda t: t, torch.Tensor.contiguous)
        ]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*given, strict=True))


def test_channels_that_are_not_aligned(emulated):
    """Heads of 16 bytes that begin 6 bytes after a multiple of 16."""
    case = random_deformable_case(form="fused", **SMALL, d=11, dtype=LOW)

    def arguments(value, *rest):
        return case.arguments(value[..., 3:], *rest)

    assert_agrees(Case(case.operator, case.leaves, arguments), emulated, LOW)


def test_an_expanded_gradient_of_the_result(emulated):
    case = random_deformable_case(**SMALL)
    out = case.registered("cuda")(*case.leaves)[0]
    found = torch.autograd.grad(out.sum(), case.leaves, retain_graph=True)
    expected = torch.autograd.grad(out, case.leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


BAD = {
    "value: dtype": {"value": (64, (1, 6, 2, 8), (96, 16, 8, 1), 3)},
    "value: no address": {"value": (0, (1, 6, 2, 8), (96, 16, 8, 1), 1)},
    "value: strides": {"value": (64, (1, 6, 2, 8), (96, -16, 8, 1), 1)},
    "value: no batch": {"value": (64, (0, 6, 2, 8), (96, 16, 8, 1), 1)},
    "places: missing": {"places": None},
    "weights: missing": {"weights": None},
    "reference: coordinates": {"reference": (64, (1, 3, 1, 3), (9, 3, 3, 1), 0)},
    "reference: alignment": {"reference": (65, (1, 3, 1, 2), (6, 2, 2, 1), 0)},
    "out: alignment": {"out": (65, (1, 3, 16), (48, 16, 1), 1)},
    "places: maps": {"spatial_shapes": [(3, 2)] * 17},
}


@pytest.mark.parametrize("name", BAD)
def test_the_launcher_refuses(emulated, name):
    case = random_deformable_case(form="fused", **SMALL, dtype=LOW)
    value, reference, offsets, logits, sizes = case.normalised()
    out = torch.full((1, 3, 16), 7.0, dtype=LOW)
    tensors = _cuda_deformable._laid_out(value, offsets, logits, reference)
    call = {"device": 0, "stream": 0, "out": view(out), **_cpu_deformable.inputs(*tensors, sizes)}
    with pytest.raises(ValueError, match=f"^{name.partition(':')[0]}: expected"):
        emulated.extension.deformable_attention_forward(**{**call, **BAD[name]})
    assert (out == 7.0).all()


def test_the_launcher_refuses_a_small_workspace(emulated):
    case = random_deformable_case(**SMALL)
    value, locations, weights, sizes = case.normalised()
    tensors = _cuda_deformable._laid_out(value, locations, weights, None)
    grad_out, grad_value = torch.zeros(1, 3, 16, dtype=value.dtype), torch.empty_like(value).contiguous()
    call = {
        "device": 0,
        "stream": 0,
        "grad_out": view(grad_out),
        **_cpu_deformable.gradients([grad_value, None, None, None]),
        **_cpu_deformable.inputs(*tensors, sizes),
    }
    size = emulated.extension.deformable_attention_workspace(**call)
    assert size % 16 == 0
    with pytest.raises(ValueError, match=f"^workspace: expected at least {size}"):
        workspace = view(torch.empty(size - 16, dtype=torch.uint8))
        emulated.extension.deformable_attention_backward(**call, workspace=workspace)
    with pytest.raises(ValueError, match="^grad_reference: expected None without reference points"):
        wrong = {**call, "grad_reference": view(torch.empty(1, 3, 1, 2))}
        emulated.extension.deformable_attention_workspace(**wrong)
