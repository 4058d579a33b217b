"""The operators under transforms: of `torch.func`, forward-mode differentiation, a derivative of the derivative.

Kernels know one backward pass; all else is the reference's, or an error that says so.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from magnet_fast import ops

from .cases import Case, all_cases, weighted_sum

NAMES = sorted(all_cases())
SAMPLING = ("deformable_attention", "fused_deformable_attention")  # PyTorch's grid_sample has one derivative itself


@pytest.fixture(params=NAMES)
def case(request) -> Case:
    return all_cases()[request.param]


def detached(case: Case) -> tuple[Tensor, ...]:
    return tuple(leaf.detach() for leaf in case.leaves)


def loss(case: Case):
    return lambda *leaves: weighted_sum(case(*leaves)).sin()


def test_second_derivatives_are_those_of_the_reference(case: Case) -> None:
    def second(function) -> tuple[Tensor | None, ...]:
        first = torch.autograd.grad(weighted_sum(function(*case.leaves)).sin(), case.leaves, create_graph=True)
        return torch.autograd.grad(weighted_sum(first).sin(), case.leaves, allow_unused=True)

    try:
        with ops.backend("reference"):
            expected = second(case)
    except RuntimeError as error:
        if "grid_sampler_2d_backward is not implemented" not in str(error):
            raise
        pytest.skip("this torch has no second derivatives of grid_sample, the reference")
    assert any(gradient is not None and gradient.any() for gradient in expected)
    torch.testing.assert_close(second(case.registered("cpu")), expected)


def test_many_gradients_at_once_are_those_one_by_one(case: Case) -> None:
    outputs = case.registered("cpu")(*case.leaves)
    out = outputs[-1]
    many = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(out, case.leaves, many, is_grads_batched=True, retain_graph=True, allow_unused=True)
    one_by_one = [torch.autograd.grad(out, case.leaves, g, retain_graph=True, allow_unused=True) for g in many]
    for index, together in enumerate(found):
        each = [gradients[index] for gradients in one_by_one]
        assert (together is None) == (each[0] is None)
        if together is not None:
            torch.testing.assert_close(together, torch.stack(each))


def test_gradients_of_torch_func(case: Case) -> None:
    """Forward and backward of the kernel on one side, the transform on the other."""
    everything = tuple(range(len(case.leaves)))
    expected = torch.autograd.grad(weighted_sum(case.registered("cpu")(*case.leaves)).sin(), case.leaves)
    torch.testing.assert_close(torch.func.grad(loss(case), everything)(*detached(case)), expected)


def test_vmap_of_outputs_and_gradients(case: Case) -> None:
    stacked = tuple(torch.stack([leaf, 0.5 * leaf]) for leaf in detached(case))
    for function in (lambda *leaves: case(*leaves), torch.func.grad(loss(case))):
        found = torch.func.vmap(function)(*stacked)
        one_by_one = [function(*(leaf[index] for leaf in stacked)) for index in range(2)]
        expected = (
            torch.stack(one_by_one)
            if isinstance(found, Tensor)
            else tuple(torch.stack(outputs) for outputs in zip(*one_by_one, strict=True))
        )
        torch.testing.assert_close(found, expected)


def test_forward_mode_is_that_of_the_reference_or_an_error(case: Case) -> None:
    """A tangent is never dropped."""
    leaves = detached(case)
    directions = tuple(leaf.cos() for leaf in leaves)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, directions, strict=True)]
        try:
            tangents = [forward_ad.unpack_dual(out).tangent for out in case(*duals)]
        except NotImplementedError as error:  # as of PyTorch's own sampling before 2.15
            assert case.operator in SAMPLING and "grid_sampler_2d" in str(error)
            return
    step = 1e-6
    ahead, behind = (
        case(*(leaf + sign * step * d for leaf, d in zip(leaves, directions, strict=True))) for sign in (1, -1)
    )
    for tangent, plus, minus in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)
    values, products = torch.func.jvp(lambda *given: case(*given), leaves, directions)
    torch.testing.assert_close(products, tuple(tangents))


def test_a_forced_kernel_says_that_it_knows_no_transform(case: Case) -> None:
    leaves = detached(case)
    assert "transform of torch.func" not in str(ops.explain(case.operator, *_call(case)[0], **_call(case)[1]))
    with ops.backend("cpu", case.operator):
        for transformed in (
            lambda: torch.func.grad(loss(case))(*leaves),
            lambda: torch.func.vmap(lambda leaf: case(leaf, *leaves[1:]))(leaves[0][None]),
        ):
            with pytest.raises(RuntimeError, match=r"cpu: a transform of torch\.func or forward-mode .* is active"):
                transformed()


def _call(case: Case) -> tuple[tuple, dict]:
    return case.arguments(*case.leaves)
