"""A whole model in inference, every way of running it: as it is, accelerated, packed, and by other runtimes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from benchmarks import COMPILED, PACKED
from benchmarks.bench_magnet import operations
from benchmarks.rivals import ONNX_RUNTIME, OPENVINO, onnx_runtime, openvino
from benchmarks.turns import in_turns
from magnet_fast.ops import _linear

Run = Callable[[], Tensor]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))


def only_if_wanted(request: pytest.FixtureRequest, quick: bool, dtype: torch.dtype = torch.float32) -> None:
    """Skip what is measured with `--full` alone, and what the processor cannot."""
    if not quick and not request.config.getoption("--full"):
        pytest.skip("--full")
    if dtype == torch.bfloat16 and not _linear._works(dtype):
        pytest.skip("this processor does not multiply bfloat16")


def compare(
    request: pytest.FixtureRequest,
    suite: str,
    title: str,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    plain: Callable[[Callable[..., Tensor]], Run] | None = None,
    more: dict[str, Run] | None = None,
    rivals: bool = True,
    by: Literal["max", "median", "ranks"] = "max",
) -> None:
    """Time every way in turns and record the rows. Answers are compared before anything is timed.

    Rows: "plain"; "cpu" after `accelerate(model)`; "cpu, packed weights" after `accelerate(model, pack=True)`; with
    `--compile` "cpu, torch.compile", which is "cpu" compiled. The rivals have the plain model: "torch.compile" (with
    `--compile`), "OpenVINO" and, in float32 with `--onnx`, "ONNX Runtime", where they are installed (extra `bench`). A
    rival that cannot take the model is warned of, with its reason.

    Args:
        suite, title: of the rows; the title is completed by "inference" and the dtype.
        model: of tensors, giving one; in evaluation mode, of `dtype`. It is copied.
        inputs: of that model.
        rounds: of the turns.
        plain: makes the plain run of a callable model, where it is more than a call.
        more: other ways, by path.
        rivals: False leaves them out.
        by: how far answers may differ: the largest error, or the median one: where queries are chosen by score, the
            last bit can choose others; or the median one between numbers of the same rank, where the last bit can
            change the queries' order.
    """
    first = copy.deepcopy(model).requires_grad_(False)
    ours, packed = copy.deepcopy(first), copy.deepcopy(first)
    magnet_fast.accelerate(ours)
    magnet_fast.accelerate(packed, pack=True)
    as_it_is = plain or (lambda called: lambda: called(*inputs))
    runs: dict[str, Run] = {
        "plain": as_it_is(first),
        "cpu": lambda: ours(*inputs),
        PACKED: lambda: packed(*inputs),
        **(more or {}),
    }
    if request.config.getoption("--compile"):
        compiled = torch.compile(ours, dynamic=False)
        runs[COMPILED] = lambda: compiled(*inputs)
    if rivals:
        runs |= _rivals(request, title, first, inputs, as_it_is, dtype)
    with torch.no_grad():
        ordered = (lambda found: found.flatten().sort().values) if by == "ranks" else (lambda found: found)
        truth = ordered(runs["plain"]().float())
        limit = 1e-3 if dtype == torch.float32 else 0.2
        for path, run in runs.items():
            off = (ordered(run().float()) - truth).abs()
            error = (off.max() if by == "max" else off.median()) / truth.abs().max()
            assert error < limit, f"{path}: {error:.2g} beside the plain form"
        info = {
            "dtype": str(dtype).removeprefix("torch."),
            "flops": operations(lambda: first(*inputs)),
            "bytes": sum(p.numel() * p.element_size() for p in first.parameters()),
        }
        rows = in_turns(runs, "plain", rounds, request.config._ceilings, **info)
    group = f"{title}, inference, {info['dtype']}"
    request.config._turns += [{"suite": suite, "group": group, **row} for row in rows]


def _rivals(
    request: pytest.FixtureRequest,
    title: str,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    as_it_is: Callable[[Callable[..., Tensor]], Run],
    dtype: torch.dtype,
) -> dict[str, Run]:
    found: dict[str, Run] = {}
    if request.config.getoption("--compile"):
        found["torch.compile"] = as_it_is(torch.compile(copy.deepcopy(model), dynamic=False))
    makers = {OPENVINO: openvino}
    if dtype == torch.float32 and request.config.getoption("--onnx"):
        makers[ONNX_RUNTIME] = onnx_runtime
    for path, make in makers.items():
        try:
            run = make(copy.deepcopy(model), inputs)
        except Exception as error:  # exporters fail in ways of their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"{title}: {path} does not take it: {reason}", stacklevel=2)
            continue
        if run is not None:
            found[path] = run
    return found
