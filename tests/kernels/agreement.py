"""How the tests of this folder compare a Triton kernel, in the interpreter, with the reference."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from magnet_fast import ops
from magnet_fast.ops import _registry

from ..ops.cases import Case, assert_low_precision, outputs_of, weighted_sum

LOW = [torch.bfloat16, torch.float16]


def run(case: Case, backend: str) -> tuple[Tensor, ...]:
    """The outputs and every gradient."""
    with ops.backend(backend):
        outputs = case()
        return (*outputs, *torch.autograd.grad(weighted_sum(outputs), case.leaves))


def in_float64(case: Case) -> Case:
    return Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)


def assert_agree(case: Case) -> tuple[Tensor, ...]:
    """Both against the reference in float64: the kernel's error is that of its dtype. Returns the kernel's results."""
    results = run(case, "triton"), run(case, "reference"), run(in_float64(case), "reference")
    assert_accurate(*results, case.leaves[0].dtype)
    assert all(ours.is_contiguous() for ours in results[0])
    return results[0]


def assert_accurate(
    ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Our results for inputs of ``dtype`` are as exact as the reference's, both against float64."""
    for i, (our, reference, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert our.dtype == reference.dtype and our.shape == reference.shape
        if our.dtype in LOW:
            assert_low_precision(our, reference, true, our.dtype, f"result {i}")
            continue
        error, baseline = (our - true).abs().max(), (reference - true).abs().max()
        limit = 4 * baseline + 32 * torch.finfo(torch.float32).eps * true.abs().max().clamp_min(1e-2)
        assert error <= limit, f"result {i} of {dtype}: error {error:.3g}, the reference has {baseline:.3g}"


def assert_each_gradient_alone(case: Case) -> None:
    """One gradient at a time has the bits that it has beside the others."""
    with ops.backend("triton"):
        every = torch.autograd.grad(weighted_sum(case()), case.leaves)
        for only, expected in enumerate(every):
            leaves = [leaf if i == only else leaf.detach() for i, leaf in enumerate(case.leaves)]
            (alone,) = torch.autograd.grad(weighted_sum(case(*leaves)), leaves[only])
            assert torch.equal(alone, expected), f"gradient {only}"


def assert_same_bits_twice(case: Case) -> None:
    for first, second in zip(run(case, "triton"), run(case, "triton"), strict=True):
        assert torch.equal(first, second)


def assert_registered(case: Case) -> None:
    """The registered operators' schemas, fake kernels and results fit together."""
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in case.normalised()]
    forward = getattr(torch.ops.magnet_fast, case.operator).default
    backward = getattr(torch.ops.magnet_fast, f"{case.operator}_backward").default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*arguments, "triton"), test_utils=checks)
    results = forward(*arguments, "triton")
    if _registry.implementation(case.operator, "triton").kept is not None:
        results, kept = results[:-1], results[-1]
        tensors = sum(isinstance(argument, Tensor) for argument in arguments)
        arguments = [*arguments[:tensors], kept, *arguments[tensors:]]
    grads = [torch.randn_like(out) for out in outputs_of(results)]
    wanted = [isinstance(arguments[i], Tensor) for i in _module(case.operator)._DIFFERENTIABLE]
    torch.library.opcheck(backward, (*grads, *arguments, wanted, "triton"), test_utils=checks)


def _module(operator: str) -> ModuleType:
    return importlib.import_module(f"magnet_fast.ops._{operator}")
