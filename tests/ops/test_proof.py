"""Kernels that must prove themselves before `auto` takes them: a stand-in for a GPU's, on the CPU."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import magnet_fast
from magnet_fast import ops
from magnet_fast.ops import _kept, _proof, _registry

from .cases import all_cases, weighted_sum, window_case

OPERATOR = "window_attention"
Change = Callable[[Any], Any]


class Fake:
    """The CPU kernels under another backend's name, changed; counts how often the forward pass ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forward: Change, backward: Change) -> None:
        item = _registry.implementation(OPERATOR, "cpu")
        self.calls = 0

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return forward(item.forward(*arguments))

        fake = replace(
            item,
            forward=run,
            backward=lambda *arguments: backward(item.backward(*arguments)),
            supports=lambda *arguments: None,
            passed_over=lambda *arguments: None,
            missing=None,
        )
        monkeypatch.setitem(_registry._implementations, (OPERATOR, "triton"), fake)


def same(result: Any) -> Any:
    return result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Callable[..., Fake]:
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(_proof.MODE_VARIABLE, raising=False)
    monkeypatch.setattr(_proof, "_verdicts", {})
    return lambda forward=same, backward=same: Fake(monkeypatch, forward, backward)


def chosen(case: Any) -> str:
    return _registry.choose(case.operator, case.normalised())


def forget() -> None:
    """As a new process begins."""
    _proof._verdicts.clear()


def answers(tmp_path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "cache" / "proofs").glob("*.json"))]


def begun(tmp_path) -> list:
    return list((tmp_path / "cache" / "proofs-begun").glob("*.json"))


def test_one_that_takes_its_process_with_it_is_not_tried_again(fake, tmp_path) -> None:
    """As a GPU's kernel does that reaches outside its memory."""
    seen = []

    def noted(result: Any) -> Any:
        seen.extend(begun(tmp_path))
        return result

    made, case = fake(noted), window_case(dtype=torch.float32)
    assert chosen(case) == "triton"
    assert len(set(seen)) == 1 and begun(tmp_path) == []
    (answer,) = (tmp_path / "cache" / "proofs").glob("*.json")
    answer.unlink()
    key = _proof.key_of((OPERATOR, "triton", "float32", "cpu"))
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    there = {"process": os.getpid(), "host": socket.gethostname()}
    # Another process is at it, another machine was, or nobody knows what this is: it is asked here as well.
    for other in (
        there,
        {"process": gone.pid, "host": "another"},
        {**there, "process": "1"},
        {**there, "process": 10**30},
    ):
        forget()
        _kept.write("proofs-begun", key, other)
        assert chosen(case) == "triton" and begun(tmp_path) == []
        answer.unlink()
    forget()
    _kept.write("proofs-begun", key, {**there, "process": gone.pid})
    calls = made.calls
    with pytest.warns(UserWarning, match=r"could not be checked .*\(the process that checked it died"):
        assert chosen(case) == "cpu"
    assert made.calls == calls
    args, kwargs = case.arguments(*case.leaves)
    assert "died" in ops.explain(OPERATOR, *args, **kwargs).reasons["triton"]
    _proof.remember((OPERATOR, "triton", "float32", "cpu"), _proof.check(OPERATOR, "triton", torch.float32, "cpu"))
    assert chosen(case) == "triton" and begun(tmp_path) == []


def test_a_check_that_is_stopped_leaves_no_trace(fake, tmp_path) -> None:
    def stopped(result: Any) -> Any:
        raise KeyboardInterrupt

    fake(stopped)
    with pytest.raises(KeyboardInterrupt):
        chosen(window_case(dtype=torch.float32))
    assert begun(tmp_path) == []


def test_a_right_one_is_taken_and_remembered(fake, tmp_path) -> None:
    made, case = fake(), window_case(dtype=torch.float32)
    assert chosen(case) == "triton"
    (answer,) = answers(tmp_path)
    assert answer["passed"] and answer["key"]["operator"] == OPERATOR and answer["key"]["dtype"] == "float32"
    calls = made.calls
    assert chosen(case) == "triton" and made.calls == calls > 0
    forget()
    assert chosen(case) == "triton" and made.calls == calls  # read from the disk


@pytest.mark.parametrize(
    "changes",
    [
        {"forward": lambda out: out * 1.01},
        {"forward": lambda out: torch.where(torch.arange(out.numel()).view(out.shape) == 7, torch.nan, out)},
        {"backward": lambda grads: [grads[0], grads[1] * 1.01, *grads[2:]]},
        {"backward": lambda grads: [*grads[:2], torch.zeros_like(grads[2]) if grads[2] is not None else None]},
    ],
    ids=["forward", "a NaN", "one gradient", "no gradient"],
)
def test_a_wrong_one_is_replaced(fake, tmp_path, changes: dict[str, Change]) -> None:
    made, case = fake(**changes), window_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match="the triton kernel of window_attention gives wrong results in float32 on cpu"):
        assert chosen(case) == "cpu"
    (answer,) = answers(tmp_path)
    assert not answer["passed"]
    calls = made.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        (out,) = case()
        with ops.backend("reference"):
            torch.testing.assert_close(out, case()[0])
    assert made.calls == calls
    args, kwargs = case.arguments(*case.leaves)
    explained = ops.explain(OPERATOR, *args, **kwargs)
    assert explained.chosen == "cpu" and "failed its check on this machine" in explained.reasons["triton"]
    forget()
    with pytest.warns(UserWarning, match="is not used"):  # by a new process once more, without a new check
        assert chosen(case) == "cpu"
    assert made.calls == calls


def test_an_error_holds_for_the_process_alone(fake, tmp_path, monkeypatch) -> None:
    def broken(out: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory\nwith a long tip")

    fake(forward=broken)
    case = window_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"could not be checked in float32 on cpu .*\(OutOfMemoryError: no memory\)"):
        assert chosen(case) == "cpu"
    assert chosen(case) == "cpu" and answers(tmp_path) == []
    forget()
    fake()
    assert chosen(case) == "triton"


def test_inside_activation_checkpointing(fake) -> None:
    """The check's tensors are not among those that are kept for the caller's backward pass."""
    made, case = fake(), window_case(dtype=torch.float32)
    expected = case.gradients()
    forget()
    for path in _kept.cache_folder().glob("proofs/*"):
        path.unlink()
    calls = made.calls
    (out,) = (checkpoint(lambda *leaves: case(*leaves)[0], *case.leaves, use_reentrant=False),)
    found = torch.autograd.grad(weighted_sum((out,)), case.leaves)
    assert made.calls > calls + 2 and all(verdict.passed for verdict in _proof._verdicts.values())
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_where_a_warning_is_an_error_the_answer_lasts(fake, tmp_path) -> None:
    fake(forward=lambda out: out * 1.01)
    case = window_case(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="gives wrong results"):
            chosen(case)
        assert chosen(case) == "cpu"
    assert [answer["passed"] for answer in answers(tmp_path)] == [False] and begun(tmp_path) == []


def test_where_hooks_are_forbidden(fake) -> None:
    """As they are for whoever must not have what is kept for the backward pass packed."""
    made, case = fake(), window_case(dtype=torch.float32)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        assert chosen(case) == "triton"
        ops.prove("cpu", (torch.float32,), (OPERATOR,))
    assert made.calls > 0


def test_what_is_not_finite_in_the_reference_proves_nothing() -> None:
    nan = torch.full((2,), torch.nan)
    assert _proof.share(torch.ones(2), nan, torch.ones(2).double(), torch.float32) == float("inf")
    assert _proof.share(torch.ones(2), torch.ones(2), nan.double(), torch.float16) == float("inf")


def test_without_a_home(fake, monkeypatch) -> None:
    monkeypatch.delenv(_kept.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_kept.Path, "home", no_home)
    fake()
    assert chosen(window_case(dtype=torch.float32)) == "triton"


def test_a_kernel_outside_the_registry_follows_the_same_rule(monkeypatch, tmp_path) -> None:
    """On any machine: level amx is said to be in use."""
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(_proof.MODE_VARIABLE, raising=False)
    monkeypatch.setattr(_proof, "_verdicts", {})
    monkeypatch.setattr(_proof, "_AMX", True)
    asked = []

    def check(passed: bool) -> Callable[[], _proof.Verdict]:
        return lambda: asked.append(passed) or _proof.Verdict(passed, "largest error 3")

    assert _proof.proved("right", torch.bfloat16, check(True)) and _proof.proved("right", torch.bfloat16, check(False))
    with pytest.warns(UserWarning, match="the cpu kernel of wrong gives wrong results in bfloat16"):
        assert not _proof.proved("wrong", torch.bfloat16, check(False))
    forget()
    with pytest.warns(UserWarning, match="the cpu kernel of wrong"):
        assert not _proof.proved("wrong", torch.bfloat16, check(True))  # from the disk
    assert asked == [True, False] and _proof.proved("wrong", torch.float32, check(False))  # not on tiles
    monkeypatch.setenv(_proof.MODE_VARIABLE, "skip")
    assert _proof.proved("wrong", torch.bfloat16, check(False)) and asked == [True, False]


def test_dtypes_are_checked_apart(fake, tmp_path) -> None:
    fake(forward=lambda out: out if out.dtype == torch.float32 else out * 1.5)
    assert chosen(window_case(dtype=torch.float32)) == "triton"
    with pytest.warns(UserWarning, match="wrong results in bfloat16"):
        assert chosen(window_case(dtype=torch.bfloat16)) == "cpu"
    found = [answer["key"] | answer for answer in answers(tmp_path)]
    assert sorted((one["dtype"], one["passed"]) for one in found if one["backend"] == "triton") == [
        ("bfloat16", False),
        ("float32", True),
    ]


def test_asked_again_after_a_change_of_version(fake, monkeypatch) -> None:
    made, case = fake(), window_case(dtype=torch.float32)
    chosen(case)
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "99.0"),
        lambda: kernels_changed(monkeypatch),
        lambda: monkeypatch.setattr(magnet_fast, "__version__", "99.0"),
        lambda: monkeypatch.setattr(_kept, "operators", lambda: "another call of the kernel, or other cases"),
    ):
        calls = made.calls
        change()
        forget()
        assert chosen(case) == "triton" and made.calls > calls


def test_the_source_of_the_operators_counts(tmp_path, monkeypatch) -> None:
    """Also where it was changed under the same version."""
    source = tmp_path / "ops"
    source.mkdir()
    (source / "_proof_cases.py").write_text("CASES = 3")
    monkeypatch.setattr(_kept, "__file__", str(source / "_kept.py"))
    hashes = [_kept.operators.__wrapped__()]
    (source / "_proof_cases.py").write_text("CASES = 4")
    hashes.append(_kept.operators.__wrapped__())
    (source / "_triton_window.py").write_text("STRIDES = 2")
    hashes.append(_kept.operators.__wrapped__())
    assert len(set(hashes)) == 3


def test_another_processor_or_release_of_a_driver_is_another_machine(tmp_path, monkeypatch) -> None:
    """Level amx is that of several, and a home folder may be shared; CUDA's number is that of many drivers."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="", major=9, minor=0))
    for variable, device, lines in (
        ("_PROCESSORS", "cpu", "processor: 0\nmodel name\t: {}\nflags: amx\nprocessor: 1\nmodel name: other\n"),
        ("_NVIDIA", "cuda:0", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5\nGCC version: 12\n"),
    ):
        file, place = tmp_path / variable, (OPERATOR, "cpu", "bfloat16", device)
        monkeypatch.setattr(_kept, variable, file)
        keys = [_proof.key_of(place)]  # without such a file
        for text in ("550.54.14", "550.54.15"):
            file.write_text(lines.format(text))
            keys.append(_proof.key_of(place))
        file.write_bytes(b"\xff")
        assert _proof.key_of(place) == keys[0]
        assert keys[0] != keys[1] != keys[2] != keys[0] and "550.54.15" in str(keys[2]) and "other" not in str(keys[2])


def kernels_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "kernels", lambda name: "other")


def test_what_is_no_answer_is_asked_again(fake, tmp_path) -> None:
    made, case = fake(), window_case(dtype=torch.float32)
    chosen(case)
    (path,) = (tmp_path / "cache" / "proofs").iterdir()
    good = json.loads(path.read_text())
    for text in (
        "",
        "[]",
        "[" * 100_000,
        "{not json",
        json.dumps({**good, "passed": "yes"}),
        json.dumps({**good, "key": {}}),
    ):
        path.write_text(text)
        calls = made.calls
        forget()
        assert chosen(case) == "triton" and made.calls > calls
    assert answers(tmp_path) == [good]


def test_without_a_folder_to_write_to(fake, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "file"))
    made, case = fake(), window_case(dtype=torch.float32)
    assert chosen(case) == "triton"
    calls = made.calls
    assert chosen(case) == "triton" and made.calls == calls
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user for a while")
@pytest.mark.parametrize("mode", [0o755, 0o700])  # it may be read, or not even that
@pytest.mark.parametrize("variable", [_kept.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"])
def test_a_folder_of_another_user(fake, monkeypatch, variable: str, mode: int) -> None:
    """The answer holds for the process; nothing is said, and nothing of the other's is touched."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is below a private one
        for name in (_kept.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, folder)
        os.chmod(folder, mode)
        made, case = fake(), window_case(dtype=torch.float32)
        os.setresuid(65534, 65534, 0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert chosen(case) == "triton"
                calls = made.calls
                assert chosen(case) == "triton" and made.calls == calls
        finally:
            os.setresuid(0, 0, 0)
        assert os.listdir(folder) == []


def test_modes(fake, monkeypatch) -> None:
    made, case = fake(), window_case(dtype=torch.float32)
    monkeypatch.setenv(_proof.MODE_VARIABLE, "skip")
    assert chosen(case) == "triton" and made.calls == 0
    monkeypatch.setenv(_proof.MODE_VARIABLE, "again")
    chosen(case)
    forget()
    calls = made.calls
    assert chosen(case) == "triton" and made.calls > calls > 0
    monkeypatch.setenv(_proof.MODE_VARIABLE, "never")
    with pytest.raises(ValueError, match="MAGNET_FAST_PROOF: expected one of once, again, skip, got 'never'"):
        chosen(case)


def test_in_a_compiled_graph_only_what_is_proven(fake) -> None:
    made, case = fake(), window_case(dtype=torch.float32)
    (expected,) = case()
    forget()
    for path in list(_kept.cache_folder().glob("proofs/*")):
        path.unlink()

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return case(*leaves)[0]

    calls = made.calls
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(*case.leaves), expected)
    assert made.calls == calls  # neither checked nor taken
    args, kwargs = case.arguments(*case.leaves)
    assert "has not proved itself" in ops.explain(OPERATOR, *args, **kwargs).reasons["triton"]
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    calls = made.calls
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(*case.leaves), expected)
    assert made.calls == calls + 1


def test_nothing_is_checked_inside_a_mode(fake) -> None:
    made = fake()
    with FakeTensorMode():
        assert chosen(window_case(dtype=torch.float32)) == "cpu"
    assert made.calls == 0


def test_the_caller_is_not_disturbed(fake) -> None:
    made, case = fake(), window_case(dtype=torch.float32)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert chosen(case) == "triton"
    assert made.calls > 0 and torch.equal(torch.rand(3), expected)
    forget()
    with torch.device("meta"):  # a default that most of a program may stand under
        ops.prove("cpu", (torch.float32,), (OPERATOR,))
    assert [place[1] for place in _proof._verdicts] == ["triton"]


def test_accelerate_has_it_proved(fake) -> None:
    made = fake()
    model = magnet_fast.models.create("lavt_tiny", image__depths=(1, 1, 1, 1), text__num_layers=1)
    magnet_fast.accelerate(nn.Sequential(model))
    assert made.calls > 0 and [place[2] for place in _proof._verdicts] == ["float32"]


@pytest.mark.parametrize("operator", _proof.OPERATORS)
def test_the_cpu_kernels_pass(operator: str) -> None:
    """And every operator has cases."""
    assert _registry._prepare.keys() == set(_proof.OPERATORS)
    for dtype in (torch.float32, torch.bfloat16):
        verdict = _proof.check(operator, "cpu", dtype, "cpu")
        assert verdict.passed, verdict.detail


@pytest.mark.parametrize("operator", ["deformable_attention", "fused_deformable_attention"])
@pytest.mark.parametrize("width", [16, 32])
def test_a_kernel_that_is_wrong_for_one_width_of_heads_fails(operator: str, width: int, monkeypatch) -> None:
    """Of deformable attention, which Triton compiles for each: those of the usual models are among the cases."""
    item = _registry.implementation(operator, "cpu")

    def forward(value: torch.Tensor, *others: Any) -> Any:
        out = item.forward(value, *others)
        return 1.01 * out if value.shape[-1] == width else out

    free = {"supports": lambda *arguments: None, "missing": None}
    wrong = replace(item, forward=forward, **free)
    monkeypatch.setitem(_registry._implementations, (operator, "triton"), wrong)
    assert not _proof.check(operator, "triton", torch.float32, "cpu").passed


def test_ordinary_cpu_calls_need_none(monkeypatch) -> None:
    monkeypatch.setattr(_proof, "check", None)
    for case in all_cases(torch.float32).values():
        assert chosen(case) in ("cpu", "reference")


def test_level_amx_needs_one(fake, monkeypatch) -> None:
    monkeypatch.setattr(_proof, "_AMX", True)
    case = window_case(dtype=torch.bfloat16)
    assert chosen(case) == "cpu" and len(_proof._verdicts) == 1
    assert chosen(window_case(dtype=torch.float32)) == "cpu" and len(_proof._verdicts) == 1  # not on tiles
    forget()
    monkeypatch.setenv(_proof.MODE_VARIABLE, "again")
    monkeypatch.setattr(_proof, "check", lambda *place: _proof.Verdict(False, "largest error 3"))
    with pytest.warns(UserWarning, match="the cpu kernel of window_attention gives wrong results in bfloat16"):
        assert chosen(window_case(dtype=torch.bfloat16)) == "reference"
