"""Calls of an operator on the device, and what every operator's kernels must do there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magnet_fast import ops
from tests.kernels.agreement import assert_accurate, in_float64
from tests.ops.cases import Case, weighted_sum


def backends_of(operator: str) -> pytest.MarkDecorator:
    """Runs a test once for each kind of GPU kernels that this machine has for the operator, as ``backend``."""
    available = ops.available_backends(operator)
    return pytest.mark.parametrize("backend", [name for name in ("triton", "cuda") if name in available])


def on_gpu(case: Case) -> Case:
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in case.leaves]

    def arguments(*given: Tensor) -> tuple[tuple, dict]:
        args, kwargs = case.arguments(*given)
        return tuple(map(_moved, args)), {name: _moved(value) for name, value in kwargs.items()}

    return Case(case.operator, leaves, arguments)


def _moved(value: object) -> object:
    return value.cuda() if isinstance(value, Tensor) else value


def run(case: Case, backend: str) -> list[Tensor]:
    """The outputs and every gradient, on the CPU."""
    with ops.backend(backend):
        outputs = case()
        # On the CPU the weights of the sum are the same numbers for every device.
        loss = weighted_sum(tuple(out.cpu() for out in outputs))
        found = (*outputs, *torch.autograd.grad(loss, case.leaves))
    return [result.detach().cpu() for result in found]


def _on_device(case: Case, backend: str) -> tuple[Tensor, ...]:
    """The outputs and every gradient of their sum."""
    with ops.backend(backend):
        outputs = case()
        return (*outputs, *torch.autograd.grad([out.sum() for out in outputs], case.leaves))


def assert_agrees(case: Case, backend: str) -> None:
    """The kernels on the device and the reference, both against the reference in float64 on the CPU."""
    results = run(on_gpu(case), backend), run(case, "reference"), run(in_float64(case), "reference")
    assert_accurate(*results, case.leaves[0].dtype)


def assert_same_bits(case: Case, backend: str, times: int = 20) -> None:
    case = on_gpu(case)
    first = _on_device(case, backend)
    for _ in range(times):
        assert all(torch.equal(a, b) for a, b in zip(_on_device(case, backend), first, strict=True))


def assert_captured(case: Case, backend: str) -> None:
    """Forward and backward pass wait for nothing on the host, and a CUDA graph of them gives the same bits."""
    case = on_gpu(case)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = _on_device(case, backend)  # compiles, and chooses configurations
        torch.cuda.set_sync_debug_mode("error")
        try:
            _on_device(case, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = _on_device(case, backend)
    for result in found:
        result.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
