"""A stand-in for a GPU's kernels, on a CPU that is said to be one, and a clock that calls move by what we say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from magnet_fast import ops
from magnet_fast.ops import _kept, _proof, _registry, _trial

from .cases import Case, window_case
from .test_proof import Fake, same

OPERATOR = "window_attention"


class Machine:
    """Calls of the operator take what `seconds` says, by backend, on a clock that nothing else moves.

    `ran` lists the backends of the calls that were timed, `around` says whether there were gradients, inference mode
    and autocast around them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        self.seconds = {"triton": 2e-3, "cpu": 1e-3, "reference": 9e-3}
        self.raises: dict[str, Exception] = {}
        self.ran: list[str] = []
        self.around: set[tuple[bool, bool, bool]] = set()
        self.now = self.spent = 0.0
        self.fake = Fake(monkeypatch, same, same)
        plain = _registry.call_of(OPERATOR)

        def call(backend: str, *arguments: Any) -> Any:
            self.ran.append(backend)
            autocast = torch.is_autocast_enabled("cpu")
            self.around.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast))
            self.now += self.seconds[backend]
            self.spent += self.seconds[backend]
            if backend in self.raises:
                raise self.raises[backend]
            return plain(backend, *arguments)

        def seconds(run, device) -> float:
            self.spent = 0.0
            run()
            return self.spent

        monkeypatch.setitem(_registry._calls, OPERATOR, call)
        monkeypatch.setattr(_trial, "_seconds", seconds)
        monkeypatch.setattr(_trial, "monotonic", lambda: self.now)

    def answers(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "choices").glob("*"))]

    def forget(self) -> None:
        """As a new process begins."""
        _trial._forms.clear()
        _trial._choices.clear()
        self.ran.clear()

    def forget_all(self) -> None:
        self.forget()
        for path in (self.folder / "choices").glob("*"):
            path.unlink()

    def pass_over(self) -> None:
        """Committed measurements speak against the stand-in."""
        item = _registry.implementation(OPERATOR, "triton")
        slow = replace(item, passed_over=lambda *arguments: "it was slower elsewhere")
        self.monkeypatch.setitem(_registry._implementations, (OPERATOR, "triton"), slow)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    for variable in (_proof.MODE_VARIABLE, _trial.MODE_VARIABLE, _registry.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "cache"))
    for module, name in ((_proof, "_verdicts"), (_trial, "_forms"), (_trial, "_choices")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(_trial, "_on_gpu", lambda arguments: True)
    return Machine(monkeypatch, tmp_path / "cache")


def small(**settings: Any) -> Case:
    return window_case(dtype=torch.float32, **settings)


def chosen(case: Case | None = None) -> str:
    case = case or small()
    return _registry.choose(case.operator, case.normalised())


def explained(case: Case | None = None) -> ops.Explanation:
    case = case or small()
    args, kwargs = case.arguments(*case.leaves)
    return ops.explain(case.operator, *args, **kwargs)
