"""Where the choice by measurement measures nothing: graphs, captures, modes, transforms, deterministic runs, CPUs."""

from __future__ import annotations

import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from magnet_fast import ops
from magnet_fast.ops import _proof, _trial

from .cases import Case, all_cases
from .stand_in import OPERATOR, chosen, explained, small


def test_a_compiled_graph_takes_what_is_known(machine) -> None:
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    case = small()
    with ops.backend("reference"):
        expected = case()[0].detach()
    taken = []

    def keep(graph, inputs):
        taken.append([node.args[-1] for node in graph.graph.nodes if "window_attention" in str(node.target)])
        return graph

    def run(dynamic: bool = False) -> None:
        torch.compiler.reset()
        leaves = [leaf.detach() for leaf in case.leaves]
        call = torch.compile(lambda *given: case(*given)[0], backend=keep, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(call(*leaves), expected)

    run()
    assert machine.ran == []
    with torch.no_grad():
        leaves = [leaf.detach() for leaf in case.leaves]
        chosen(Case(OPERATOR, leaves, case.arguments))
    machine.forget()
    run()  # by what stands on the disk
    run(dynamic=True)  # of shapes that may change nothing is known
    machine.monkeypatch.setenv(_trial.MODE_VARIABLE, "guess")
    run()
    assert taken == [["triton"], ["cpu"], ["triton"], ["triton"]] and machine.ran == []


def test_not_under_a_mode_nor_during_a_capture(machine, monkeypatch) -> None:
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    with FakeTensorMode():
        assert chosen() == "triton"
    assert _trial._choices == {}  # of tensors that are none nothing is known
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _proof.may_run(torch.device("cuda", 0))
    with monkeypatch.context() as patched:
        patched.setattr(_proof, "may_run", lambda device: False)
        assert chosen() == "triton" and machine.ran == [] and machine.answers() == []
        assert "came first under a mode or during a capture" in explained().measured
    assert chosen() == "triton" and machine.ran == []  # a process goes on as it began
    machine.forget()
    assert chosen() == "cpu" and machine.ran != []
    machine.ran.clear()
    monkeypatch.setattr(_proof, "may_run", lambda device: False)
    assert chosen(small(size=(6, 3))) == "cpu" and machine.ran == []  # of a known class


class Seen(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_not_while_functions_are_watched(machine) -> None:
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    with Seen():
        assert chosen() == "triton" and machine.ran == []


def test_not_for_deterministic_algorithms(machine) -> None:
    chosen()
    machine.ran.clear()
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == "triton" and explained().chosen == "triton" and explained().measured == ""
        assert chosen(small(batch=8)) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    assert machine.ran == [] and chosen() == "cpu"


def test_not_in_a_transform_nor_in_a_graph_for_elsewhere(machine) -> None:
    case = small()
    taken = []

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            taken.append(chosen(Case(OPERATOR, list(leaves), case.arguments)))
        return case(*leaves)[0]

    leaves = tuple(leaf.detach() for leaf in case.leaves)
    call(*leaves)
    machine.ran.clear()
    torch.func.jvp(call, leaves, leaves)
    torch.func.vmap(lambda qkv: call(qkv, *leaves[1:]))(leaves[0][None])
    call(*leaves)
    assert taken == ["cpu", "reference", "reference", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(call, leaves, check_trace=False)

    class Module(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return call(*given)

    exported = torch.export.export(Module(), leaves)
    assert "magnet_fast" not in exported.graph_module.code
    assert machine.ran == [] and len(machine.answers()) == 1


def test_calls_on_a_cpu_are_not_looked_at(monkeypatch) -> None:
    for name in ("mode", "_form", "_look"):
        monkeypatch.setattr(_trial, name, None)
    for case in all_cases(torch.float32).values():
        assert chosen(case) == "cpu" and explained(case).measured == ""
