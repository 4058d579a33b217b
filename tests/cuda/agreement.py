"""Comparison of the emulated kernels with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from magnet_fast import ops

from ..ops.cases import Case, assert_low_precision, weighted_sum


def outputs(case: Case, backend: str) -> tuple[Tensor, ...]:
    """The emulated kernels' by way of the registered operators, which choose no backend; or the reference's."""
    if backend == "cuda":
        return case.registered(backend)(*case.leaves)
    with ops.backend(backend):
        return case()


def results(case: Case, backend: str) -> tuple[Tensor, ...]:
    """Outputs and every gradient."""
    out = outputs(case, backend)
    return (*out, *torch.autograd.grad(weighted_sum(out), case.leaves))


def in_float64(case: Case) -> Case:
    return Case(case.operator, [leaf.detach().double().requires_grad_() for leaf in case.leaves], case.arguments)


def assert_agrees(case: Case, emulated, dtype: torch.dtype) -> None:
    """The kernels against the reference in the same dtype, both measured by the reference in float64; and the same bits
    when blocks and threads run in the opposite order."""
    ours = results(case, "cuda")
    emulated.device.set_reversed(1)
    backwards = results(case, "cuda")
    emulated.device.set_reversed(0)
    exact, plain = results(in_float64(case), "reference"), results(case, "reference")
    for i, (mine, again, theirs, truth) in enumerate(zip(ours, backwards, plain, exact, strict=True)):
        what = f"result {i} of {case.operator}"
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.equal(mine, again), what
        if dtype == torch.float32:
            scale, error = truth.abs().max().clamp_min(1e-3), (mine - truth).abs().max()
            assert error <= 4 * (theirs - truth).abs().max() + 2e-6 * scale, what
            assert error <= 2e-5 * scale, what
        else:
            assert_low_precision(mine, theirs, truth, dtype, what)
