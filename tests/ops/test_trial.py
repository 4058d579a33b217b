"""The choice by measurement: what is timed, what is taken, and what is kept."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import magnet_fast
from magnet_fast import ops
from magnet_fast.ops import _kept, _proof, _registry, _trial

from .cases import Case, random_deformable_case, weighted_sum, window_case
from .stand_in import OPERATOR, chosen, explained, small
from .test_proof import Fake, same


def test_the_fastest_is_taken_and_kept(machine) -> None:
    assert chosen() == "cpu" and set(machine.ran) == {"triton", "cpu", "reference"}
    (answer,) = machine.answers()
    assert answer["winner"] == "cpu" and answer["key"]["operator"] == OPERATOR
    assert answer["seconds"] == machine.seconds and answer["failed"] == {}
    assert set(answer["key"]["candidates"]) == {"triton", "cpu", "reference"}
    machine.ran.clear()
    assert chosen() == "cpu" and machine.ran == []
    machine.forget()
    machine.seconds["cpu"] = 1.0
    assert chosen() == "cpu" and machine.ran == []  # read from the disk


def test_a_call_runs_on_what_was_chosen(machine) -> None:
    case = small()
    with ops.backend("reference"):
        expected = case()[0]
    (out,) = case()
    calls = machine.fake.calls
    torch.testing.assert_close(out, expected)
    machine.forget_all()
    machine.seconds["triton"] = 1e-4
    torch.testing.assert_close(case()[0], expected)
    assert chosen(case) == "triton" and machine.fake.calls > calls


@pytest.mark.parametrize(("seconds", "name"), [(1.01e-3, "triton"), (0.96e-3, "triton"), (0.94e-3, "cpu")])
def test_the_first_guess_stays_unless_another_is_clearly_faster(machine, seconds: float, name: str) -> None:
    machine.seconds |= {"triton": 1e-3, "cpu": seconds}
    assert chosen() == name


def test_committed_measurements_are_a_first_guess(machine, monkeypatch) -> None:
    machine.pass_over()
    machine.seconds |= {"triton": 0.5e-3, "cpu": 1e-3}
    assert chosen() == "triton"
    assert machine.ran[0] == "cpu"
    monkeypatch.setenv(_trial.MODE_VARIABLE, "guess")
    assert chosen() == "cpu" and "it was slower elsewhere" in explained().reasons["triton"]


def test_how_much_is_run(machine) -> None:
    """In turns; what is far behind not again, and nobody once the time is over."""
    machine.seconds |= {"triton": 1.2e-3, "cpu": 1e-3, "reference": 1e-2}
    chosen()
    assert machine.ran[:6] == ["triton", "cpu", "reference"] * 2
    assert [machine.ran.count(name) for name in ("triton", "cpu", "reference")] == [11, 11, 3]
    machine.forget_all()
    machine.seconds |= {"triton": 0.2, "cpu": 0.19, "reference": 0.2}
    chosen()
    assert len(machine.ran) == 3 * (2 + 1)


def test_seconds_are_those_of_the_device(monkeypatch) -> None:
    done = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.place = len(done)
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5 * (end.place - self.place)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert _trial._seconds(lambda: done.append("run"), torch.device("cuda", 0)) == pytest.approx(5e-3)
    assert done == ["record", "run", "record", "wait"]


def test_gradients_count_where_they_are_asked_for(machine, monkeypatch) -> None:
    backward = []
    item = _registry.implementation(OPERATOR, "triton")
    counting = replace(item, backward=lambda *arguments: backward.append(1) or item.backward(*arguments))
    monkeypatch.setitem(_registry._implementations, (OPERATOR, "triton"), counting)
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    backward.clear()
    with torch.no_grad():
        chosen()
    assert machine.ran and backward == []
    machine.ran.clear()
    chosen()
    assert len(backward) == machine.ran.count("triton") > 0
    assert sorted(answer["key"]["class"].split()[-2] for answer in machine.answers()) == ["with", "without"]


def test_classes() -> None:
    def of(case: Case) -> tuple:
        return _trial.shape_class(case.operator, case.normalised())

    base = of(small(batch=4))
    assert of(small(batch=3)) == base and of(small(batch=4, size=(7, 3))) == base
    for other in (small(batch=5), small(batch=4, heads=4), small(batch=4, d=3), small(batch=4, window=(2, 4))):
        assert of(other) != base
    assert of(window_case(dtype=torch.bfloat16, batch=4)) != base
    with torch.no_grad():
        assert of(small(batch=4)) != base
    maps = [of(random_deformable_case(maps=maps, points=2)) for maps in ([(5, 4)], [(7, 4)], [(9, 4)])]
    assert maps[0] == maps[1] != maps[2]


def test_classes_are_measured_apart(machine) -> None:
    assert chosen(small(batch=2)) == "cpu"
    machine.seconds |= {"triton": 1e-3, "cpu": 2e-3}
    machine.ran.clear()
    assert chosen(small(batch=2, shift=(1, 2), size=(6, 3))) == "cpu" and machine.ran == []
    assert chosen(small(batch=8)) == "triton" and chosen(small(batch=2)) == "cpu"
    assert len(machine.answers()) == 2


def test_a_winner_that_cannot_run_a_call_of_its_class(machine, monkeypatch) -> None:
    item = _registry.implementation(OPERATOR, "cpu")
    odd = replace(item, supports=lambda qkv, *rest: "no odd batches" if qkv.shape[0] % 2 else None)
    monkeypatch.setitem(_registry._implementations, (OPERATOR, "cpu"), odd)
    assert chosen(small(batch=4)) == "cpu"
    assert chosen(small(batch=3)) == "triton"
    assert chosen(small(batch=4)) == "cpu"


def test_asked_again_after_a_change_of_version(machine, monkeypatch) -> None:
    chosen()
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "99.0"),
        lambda: monkeypatch.setattr(_kept, "kernels", lambda name: "other"),
        lambda: monkeypatch.setattr(_kept, "triton_version", lambda: "99.0"),
        lambda: monkeypatch.setattr(magnet_fast, "__version__", "99.0"),
    ):
        change()
        machine.forget()
        _proof._verdicts.clear()
        assert chosen() == "cpu" and machine.ran != []


def test_what_is_no_answer_is_asked_again(machine) -> None:
    chosen()
    (path,) = (machine.folder / "choices").iterdir()
    good = json.loads(path.read_text())
    for wrong in (
        "",
        "[]",
        "[" * 100_000,
        "{not json",
        json.dumps({**good, "winner": "cuda"}),
        json.dumps({**good, "winner": ["cpu"]}),
        json.dumps({**good, "seconds": {"cpu": "fast"}}),
        json.dumps({**good, "seconds": {"cpu": -1.0}}),
        json.dumps({**good, "seconds": {**good["seconds"], "cuda": 1.0}}),
        json.dumps({**good, "key": {}}),
    ):
        path.write_text(wrong)
        _trial.remembered()  # nor does the doctor stop at it
        machine.forget()
        assert chosen() == "cpu" and machine.ran != [], wrong
        machine.forget()
        assert chosen() == "cpu" and machine.ran == [], wrong
    assert machine.answers() == [good]


def test_without_a_folder_to_write_to(machine, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path / "file"))
    assert chosen() == "cpu" and machine.ran != []
    machine.ran.clear()
    assert chosen() == "cpu" and machine.ran == []


def test_a_file_system_without_links(machine, monkeypatch) -> None:
    def no_links(*names: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "link", no_links)
    assert chosen() == "cpu"
    (answer,) = machine.answers()
    assert answer["winner"] == "cpu"
    _kept.write_first("choices", answer["key"], {"winner": "triton"}, lambda answer: True)
    assert machine.answers() == [answer]  # nor is a first one replaced


def test_of_several_processes_the_first_counts(machine, monkeypatch) -> None:
    times = _trial._times

    def slow(*arguments: Any) -> Any:
        found = times(*arguments)
        key = machine_key()
        theirs = {"winner": "triton", "seconds": {"triton": 1e-3, "cpu": 2e-3}, "failed": {}}
        _kept.write_first("choices", key, theirs, lambda answer: True)
        return found

    def machine_key() -> dict:
        place = _trial._with_tf32(_trial.shape_class(OPERATOR, small().normalised()))
        return _trial._key(place, ("triton", "cpu", "reference"))

    monkeypatch.setattr(_trial, "_times", slow)
    assert chosen() == "triton" and len(machine.answers()) == 1


def test_of_two_that_look_at_once_the_first_counts(machine, monkeypatch) -> None:
    """The other's answer comes just when this one has seen that there is none, and before it writes its own."""
    read, key, theirs = _kept.read, {"one": 1}, [{"winner": "triton"}]

    def looked(folder: str, of: dict) -> dict | None:
        found = read(folder, of)
        if theirs:
            _kept.write_first(folder, of, theirs.pop(), lambda answer: True)
        return found

    monkeypatch.setattr(_kept, "read", looked)
    link = os.link
    monkeypatch.setattr(os, "link", lambda *names: looked("choices", key) or link(*names))
    _kept.write_first("choices", key, {"winner": "cpu"}, lambda answer: True)
    assert theirs == [] and [answer["winner"] for answer in machine.answers()] == ["triton"]


def test_what_raises_is_left_out(machine) -> None:
    machine.raises = {"cpu": torch.OutOfMemoryError("no memory\nwith a long tip")}
    assert chosen() == "triton"
    (answer,) = machine.answers()
    assert answer["failed"] == {"cpu": "OutOfMemoryError: no memory"} and "cpu" not in answer["seconds"]
    assert "cpu failed (OutOfMemoryError: no memory)" in explained().measured
    machine.forget_all()
    machine.raises = {"triton": RuntimeError("the first guess")}
    assert chosen() == "cpu"
    machine.forget_all()
    machine.raises = dict.fromkeys(machine.seconds, RuntimeError("anything"))
    assert chosen() == "triton" and machine.answers() == []


def test_what_is_not_proven_is_never_timed(machine, monkeypatch) -> None:
    machine.fake = Fake(monkeypatch, lambda out: out * 1.01, same)
    machine.seconds["triton"] = 1e-6
    with pytest.warns(UserWarning, match="the triton kernel of window_attention gives wrong results"):
        assert chosen() == "cpu"
    assert set(machine.ran) == {"cpu", "reference"}
    assert set(machine.answers()[0]["key"]["candidates"]) == {"cpu", "reference"}


def test_nothing_is_measured_for_one_candidate(machine) -> None:
    for name in ("triton", "cpu"):
        machine.monkeypatch.delitem(_registry._implementations, (OPERATOR, name))
    assert chosen() == "reference" and machine.ran == [] and machine.answers() == []
    assert explained().measured == ""


def test_a_forced_backend_is_taken(machine, monkeypatch) -> None:
    for name in ("triton", "cpu", "reference"):
        with ops.backend(name):
            assert chosen() == name
    monkeypatch.setenv(_registry.ENVIRONMENT_VARIABLE, "reference")
    assert chosen() == "reference" and explained().measured == "" and machine.ran == []
    with ops.backend("auto"):
        assert chosen() == "cpu" and machine.ran != []


def test_modes(machine, monkeypatch) -> None:
    monkeypatch.setenv(_trial.MODE_VARIABLE, "guess")
    assert chosen() == "triton" and machine.ran == [] and explained().measured == ""
    monkeypatch.setenv(_trial.MODE_VARIABLE, "measure")
    assert chosen() == "cpu"
    monkeypatch.setenv(_trial.MODE_VARIABLE, "always")
    with pytest.raises(ValueError, match="MAGNET_FAST_CHOICE: expected one of measure, guess, got 'always'"):
        chosen()


def test_explain(machine) -> None:
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    before = explained()
    assert (before.chosen, before.measured) == ("triton", "not measured yet: the first ordinary call of such shapes is")
    assert machine.ran == []
    chosen()
    machine.ran.clear()
    after = explained()
    assert after.chosen == "cpu" and machine.ran == []
    assert after.reasons["triton"] == "can run, but cpu was measured to be the better here"
    day = machine.answers()[0]["date"]
    assert str(after).splitlines()[-1] == f"  times: cpu 1 ms, triton 2 ms, reference 9 ms, measured {day}"
    machine.forget()
    assert explained() == after and machine.ran == []
    ((calls, choice),) = _trial.remembered()
    assert calls.startswith("window_attention float32 2x8x4x12, ") and choice.winner == "cpu"


def test_neither_the_caller_nor_the_trial_is_disturbed(machine) -> None:
    case = small()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        _registry.choose(OPERATOR, (case.leaves[0].detach().clone(), *case.normalised()[1:]))
    assert machine.around == {(False, False, False)} and torch.equal(torch.rand(3), expected)
    machine.forget_all()
    machine.around.clear()
    case()
    assert machine.around == {(True, False, False)} and all(leaf.grad is None for leaf in case.leaves)


def test_inside_activation_checkpointing(machine) -> None:
    case = small()
    with ops.backend("reference"):
        expected = case.gradients()
    for reentrant in (False, True):  # the latter's second forward pass is inside of a backward pass
        machine.forget_all()
        out = checkpoint(lambda *leaves: case(*leaves)[0], *case.leaves, use_reentrant=reentrant)
        for leaf in case.leaves:
            leaf.grad = None
        weighted_sum((out,)).backward()
        assert len(machine.answers()) == 1 + reentrant  # without gradients first, then with them
        for leaf, plain in zip(case.leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, plain)
