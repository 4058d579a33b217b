"""Checks in a process of their own, by a stand-in for a GPU's kernel that ends it, hangs or breaks its device there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from magnet_fast import ops
from magnet_fast.ops import _kept, _proof, _proof_apart, _registry

from .apart import DEEDS, OPERATOR, REACHED
from .cases import window_case
from .test_proof import Fake, answers, begun, chosen, fake, forget  # noqa: F401 - a fixture

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class Children:
    """The children that were started; `deeds` is what the kernel does in them, by dtype."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.count = monkeypatch, 0
        start = subprocess.Popen

        def counted(*arguments, **named):
            self.count += 1
            return start(*arguments, **named)

        monkeypatch.setattr(_proof_apart.subprocess, "Popen", counted)

    def do(self, **deeds: str) -> None:
        self.monkeypatch.setenv(DEEDS, json.dumps(deeds))


@pytest.fixture
def children(fake, monkeypatch) -> Children:  # noqa: F811
    """On a CPU that counts as a GPU, with the stand-in in the child alone: here the kernel is as it was."""
    monkeypatch.setattr(_proof_apart, "wanted", lambda place: place[1] == "triton")
    start = _proof_apart._START.replace("magnet_fast.ops._proof_child", "tests.ops.apart")
    monkeypatch.setattr(_proof_apart, "_START", start)
    return Children(monkeypatch)


def verdicts() -> dict[str, _proof.Verdict]:
    return {place[2]: verdict for place, verdict in _proof._verdicts.items() if place[1] == "triton"}


def test_a_right_one_is_proved_there(fake, children, tmp_path) -> None:  # noqa: F811
    made = fake()
    children.do(float32="prints", bfloat16="right", float16="wrong")
    with pytest.warns(UserWarning, match="wrong results in float16 on cpu"):
        ops.prove("cpu", tuple(DTYPES.values()), (OPERATOR,))
    assert children.count == 1 and made.calls == 0 and begun(tmp_path) == []
    assert [chosen(window_case(dtype=DTYPES[name])) for name in ("float32", "bfloat16")] == ["triton", "triton"]
    found = {one["key"]["dtype"]: one["passed"] for one in answers(tmp_path)}
    assert found == {"float32": True, "bfloat16": True, "float16": False}
    forget()
    assert chosen(window_case(dtype=torch.float32)) == "triton" and children.count == 1 and made.calls == 0


def test_the_first_call_starts_one(fake, children) -> None:  # noqa: F811
    made, case = fake(), window_case(dtype=torch.float32)
    children.do(float32="right")
    with torch.device("meta"):  # of the caller's; the check's inputs are where they are
        assert chosen(case) == "triton"
    assert chosen(case) == "triton" and children.count == 1 and made.calls == 0


@pytest.mark.slow
def test_one_that_ends_its_process_or_hangs(fake, children, tmp_path, monkeypatch) -> None:  # noqa: F811
    """The caller's goes on, with the checks that come after as well; the answer lasts."""
    made = fake()
    monkeypatch.setattr(_proof_apart, "SECONDS", 10.0)
    children.do(float32="segfault", bfloat16="hang", float16="right")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ops.prove("cpu", tuple(DTYPES.values()), (OPERATOR,))
    assert children.count == 3 and made.calls == 0 and begun(tmp_path) == []
    found = verdicts()
    assert found["float32"] == (False, "SIGSEGV ended the process that checked it", False, True)
    assert found["bfloat16"] == (False, "no answer within 10 s", False, True)
    assert found["float16"].passed and len(told) == 2
    assert "triton kernel of window_attention could not be checked in float32 on cpu and is not" in str(told[0].message)
    case = window_case(dtype=torch.float32)
    assert chosen(case) == "cpu"
    args, kwargs = case.arguments(*case.leaves)
    assert "SIGSEGV ended the process" in ops.explain(OPERATOR, *args, **kwargs).reasons["triton"]
    with ops.backend("reference"):
        expected = case()
    torch.testing.assert_close(case(), expected)
    forget()
    with pytest.warns(UserWarning, match="could not be checked in float32 .*SIGSEGV"):
        assert chosen(case) == "cpu"
    assert verdicts()["float32"] == found["float32"] and children.count == 3


@pytest.mark.slow
def test_one_that_breaks_its_device(fake, children, tmp_path) -> None:  # noqa: F811
    """As after an illegal memory access: every later check in that process would fail, right or not."""
    made = fake()
    children.do(float32="breaks", bfloat16="right", float16="raises")
    with pytest.warns(UserWarning, match=r"could not be checked in float32 .*\(RuntimeError: what breaks\)"):
        ops.prove("cpu", tuple(DTYPES.values()), (OPERATOR,))
    assert children.count == 2
    found = verdicts()
    assert found["float32"].lasting and found["bfloat16"].passed
    # What was raised where the device goes on is asked for in the process itself: its memory may suffice.
    assert found["float16"].passed and found["float16"].measured and made.calls > 0
    forget()
    with pytest.warns(UserWarning, match="what breaks"):
        assert chosen(window_case(dtype=torch.float32)) == "cpu"


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        ("terminated", "SIGTERM ended the process that checked it"),
        ("exit", "the process that checked it ended with status 7"),
    ],
)
def test_what_may_be_of_the_moment_holds_for_the_process(fake, children, tmp_path, deed: str, told: str) -> None:  # noqa: F811
    fake()
    children.do(float32=deed)
    with pytest.warns(UserWarning, match=f"could not be checked in float32 on cpu and is not used .{told}"):
        assert chosen(window_case(dtype=torch.float32)) == "cpu"
    assert answers(tmp_path) == [] and begun(tmp_path) == []


def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")


def ends_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEEDS, json.dumps({"float32": "absent"}))


def a_device_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEEDS, json.dumps({"float32": "full"}))


def silent_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_proof_apart, "BEGIN_SECONDS", 0.3)
    monkeypatch.setattr(_proof_apart, "_START", "import time; time.sleep(60)")


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child sees another machine."""
    monkeypatch.setattr(_kept, "triton_version", lambda: "0.0")


WITHOUT = [no_interpreter, ends_before_it_begins, silent_before_it_begins, a_device_that_is_full, elsewhere]


@pytest.mark.parametrize("why", WITHOUT)
def test_without_a_child_it_is_checked_here(fake, children, tmp_path, why: Callable) -> None:  # noqa: F811
    made = fake()
    children.do(float32="segfault")
    why(children.monkeypatch)
    assert chosen(window_case(dtype=torch.float32)) == "triton"
    assert made.calls > 0 and begun(tmp_path) == [] and [one["passed"] for one in answers(tmp_path)] == [True]


def test_where_a_process_of_its_own_is_wanted(monkeypatch) -> None:
    place = OPERATOR, "triton", "float32", "cuda:0"
    for name in ("python", "python3.12", "/opt/x/bin/python3", "pypy3", "Python"):
        monkeypatch.setattr(sys, "executable", name)
        assert _proof_apart.wanted(place) and not _proof_apart.wanted((*place[:3], "cpu"))
    for name in ("", None, "/usr/bin/blender", "uwsgi", "my-python-app"):  # they would be started once more
        monkeypatch.setattr(sys, "executable", name)
        assert not _proof_apart.wanted(place)


def test_the_child_imports_what_the_caller_does(fake, children, tmp_path, monkeypatch) -> None:  # noqa: F811
    """And nothing of the working folder."""
    (tmp_path / "json.py").write_text("raise SystemExit('code of the working folder was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    made = fake()
    children.do(float32="right")
    assert chosen(window_case(dtype=torch.float32)) == "triton" and made.calls == 0 and children.count == 1


def test_one_that_is_interrupted_leaves_no_child(fake, children, monkeypatch, tmp_path) -> None:  # noqa: F811
    started, start = [], subprocess.Popen
    monkeypatch.setattr(_proof_apart.subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])

    def interrupted(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(_proof_apart, "_lines", interrupted)
    fake()
    children.do(float32="hang")
    with pytest.raises(KeyboardInterrupt):
        chosen(window_case(dtype=torch.float32))
    assert started[0].returncode == -9


def test_nothing_is_started_where_no_proof_is_asked_for(fake, children, monkeypatch) -> None:  # noqa: F811
    fake()
    monkeypatch.setenv(_proof.MODE_VARIABLE, "skip")
    assert chosen(window_case(dtype=torch.float32)) == "triton"
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    assert children.count == 0


def test_the_doctor_asks_there_too(fake, children, monkeypatch) -> None:  # noqa: F811
    """A kernel that ends its process does not end the report."""
    fake()
    children.do(float32="segfault")
    place = OPERATOR, "triton", "float32", "cpu"
    found = _proof.checked_apart([place, (OPERATOR, "cpu", "float32", "cpu")])
    assert list(found) == [place] and not found[place].passed and place not in _proof._verdicts
    assert _registry.why_not(OPERATOR, "triton", window_case(dtype=torch.float32).normalised()) is None


STOPPED = """
import signal
import sys
from dataclasses import replace
import torch
from magnet_fast import ops
from magnet_fast.ops import _proof_apart, _registry
from tests.ops.apart import OPERATOR

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
_proof_apart.wanted = lambda place: place[1] == "triton"
_proof_apart._START = _proof_apart._START.replace("magnet_fast.ops._proof_child", "tests.ops.apart")
free = {"supports": lambda *arguments: None, "passed_over": lambda *arguments: None, "missing": None}
_registry._implementations[OPERATOR, "triton"] = replace(_registry.implementation(OPERATOR, "cpu"), **free)
ops.prove("cpu", (torch.float32,), (OPERATOR,))
"""


def a_job(reached: Path, code: str = STOPPED) -> subprocess.Popen:
    """In a group of its own; its check is under way."""
    environment = {**os.environ, REACHED: str(reached)}
    job = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL, env=environment
    )
    while not reached.exists():
        assert job.poll() is None
        time.sleep(0.05)
    return job


@pytest.mark.slow
def test_a_job_that_stands_still_for_longer_than_a_check_may_take(fake, children, tmp_path) -> None:  # noqa: F811
    """Ctrl-Z, a container that is paused, a machine that moves: nothing hangs."""
    children.do(float32="slow")
    job = a_job(tmp_path / "reached", STOPPED.replace("ops.prove", "_proof_apart.SECONDS = 8.0\nops.prove"))
    try:
        os.killpg(job.pid, signal.SIGSTOP)
        time.sleep(10)
        os.killpg(job.pid, signal.SIGCONT)
        assert job.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert [one["passed"] for one in answers(tmp_path)] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_stopped_says_nothing_of_the_kernel(fake, children, tmp_path, number: int) -> None:  # noqa: F811
    """Ctrl-C, or a scheduler, while a check is under way: both processes are gone, and the next one asks again."""
    children.do(float32="hang")
    job = a_job(tmp_path / "reached")
    try:
        os.killpg(job.pid, number)
        assert job.wait() == -number
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert begun(tmp_path) == []
    fake()
    children.do(float32="right")
    assert chosen(window_case(dtype=torch.float32)) == "triton" and verdicts()["float32"].measured
