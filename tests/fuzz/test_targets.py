"""A few inputs of every target, always the same ones; `make fuzz` tries many more, with new ones each time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import TARGETS, running, target_class
from tests.fuzz import __main__ as command
from tests.fuzz.target import READ, REFUSED, Finding, Target, outcome_of


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_harm(name: str, tmp_path: Path) -> None:
    """In processes of their own: this one stays as it is, and no input can end it."""
    count, out = target_class(name).quick, tmp_path / "summary.json"
    command = [sys.executable, "-m", "tests.fuzz", name, str(count), "7", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(out.read_text())["targets"][name]
    assert summary["findings"] == {} and summary["inputs"] == count
    assert summary["read"] + summary["refused"] == count and min(summary["read"], summary["refused"]) > 0


class Harmful(Target):
    """Does what no reader may do."""

    batch = 3

    def try_one(self, draw: random.Random) -> str:
        path = self.folder / "file"
        path.write_bytes(b"content")
        return outcome_of(self.deed, path, named="file")

    @staticmethod
    def deed() -> None:
        """Nothing."""


def tried(name: str, target: type[Target], count: int, workers: int = 1) -> running.Report:
    return running.run(running.Report(name, 1, [(0, count)]), target, workers, told=False)


def doing(deed) -> type[Target]:
    return type("One", (Harmful,), {"deed": staticmethod(deed)})


def unnamed() -> None:
    raise ValueError("something is wrong")


def unrelated() -> None:
    raise KeyError("file")


@pytest.mark.parametrize(
    ("deed", "kind"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), f"signal {signal.SIGSEGV.value}"),
        (lambda: os.system("true"), "_Forbidden"),
        (lambda: subprocess.run(["true"]), "_Forbidden"),
        (lambda: Path("file").unlink(), "_Forbidden"),
        (lambda: Path("other").write_text("x"), "_Forbidden"),
        (unnamed, "Finding"),
        (unrelated, "KeyError"),
    ],
)
def test_harm_is_found_and_the_rest_is_tried(deed, kind: str) -> None:
    report = tried("harm", doing(deed), 5)
    assert report.done == 5 and not report.outcomes[READ]
    ((found, told),) = report.findings.items()
    assert found.startswith(kind) and told["count"] == 5 and told["input"] == 0


def test_a_hang_is_found(monkeypatch) -> None:
    monkeypatch.setattr(running, "SECONDS", 0.2)
    report = tried("hang", doing(lambda: time.sleep(60)), 1)
    assert list(report.findings) == ["hang"]


def test_what_is_read_is_no_finding() -> None:
    report = tried("harmless", doing(lambda: None), 4)
    assert report.outcomes[READ] == report.done == 4 and not report.findings


class Numbered(Target):
    """Notes each input; input 5 ends its process, 9 is a finding, and every second one is refused."""

    batch, long = 3, 26
    notes: Path

    def try_one(self, draw: random.Random) -> str:
        raise NotImplementedError

    def try_many(self, seed, first, count, done) -> None:
        for number in range(first, first + count):
            with self.notes.open("a") as file:
                file.write(f"{seed} {number}\n")
            if number == 5:
                os.kill(os.getpid(), signal.SIGSEGV)
            done(number, KeyError("x") if number == 9 else (READ, REFUSED)[number % 2])


def test_every_input_once_by_two_processes(tmp_path: Path) -> None:
    target = type("Noted", (Numbered,), {"notes": tmp_path / "notes"})
    report = tried("numbered", target, 26, workers=2)
    assert sorted((tmp_path / "notes").read_text().splitlines()) == sorted(f"1 {number}" for number in range(26))
    assert report.done == 26 and report.left == [] and report.outcomes == {READ: 13, REFUSED: 11}
    assert sorted(report.findings) == ["KeyError in outside", f"signal {signal.SIGSEGV.value}"]


@pytest.mark.parametrize("how", [KeyboardInterrupt, "SIGTERM"])
def test_a_stopped_one_goes_on(tmp_path: Path, monkeypatch, capsys, how) -> None:
    """With the seed that it began with; what was going on is tried again, what was done is not."""
    target = type("Noted", (Numbered,), {"notes": tmp_path / "notes"})
    monkeypatch.setattr(command, "target_class", lambda name: target)
    out, keep = tmp_path / "deep" / "out.json", command._add
    given = ["masks", "26", "4", "--workers", "2", "--out", str(out), "--resume", "--name", "numbered"]

    def stopped(path: Path, name: str, report: running.Report) -> None:
        keep(path, name, report)
        if report.done > 10:
            if how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            raise how

    monkeypatch.setattr(command, "_add", stopped)
    assert command.main(given) == 130 and "stopped; the same command with --resume goes on" in capsys.readouterr().err
    half = json.loads(out.read_text())["targets"]["numbered"]
    assert 10 < half["inputs"] < 26 and sum(end - first for first, end in half["left"]) == 26 - half["inputs"]
    monkeypatch.setattr(command, "_add", keep)
    given[2] = "5"
    assert command.main(given) == 1  # its findings
    whole = json.loads(out.read_text())["targets"]["numbered"]
    assert whole["seed"] == 4 and whole["inputs"] == 26 and "left" not in whole
    assert (whole["read"], whole["refused"]) == (13, 11)
    assert {kind: found["count"] for kind, found in whole["findings"].items()} == {
        "KeyError in outside": 1,
        "signal 11": 1,
    }
    lines = (tmp_path / "notes").read_text().splitlines()
    assert set(lines) == {f"4 {number}" for number in range(26)}
    assert command.main(given) == 1 and (tmp_path / "notes").read_text().splitlines() == lines  # nothing is left
    given[1] = "28"
    assert command.main(given) == 1 and (tmp_path / "notes").read_text().splitlines()[len(lines) :] == ["4 26", "4 27"]


def test_stopped_where_several_have_ended(tmp_path: Path, monkeypatch) -> None:
    """Both children are gone when the first one's end is written down, and that is where it stops."""
    report, sleep = running.Report("numbered", 4, [(0, 26)]), time.sleep
    monkeypatch.setattr(running.time, "sleep", lambda seconds: sleep(1.0))

    def stop(report: running.Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(
            report, type("Quick", (Numbered,), {"batch": 2, "notes": tmp_path / "notes"}), 2, told=False, kept=stop
        )


def test_a_lost_file_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(Finding, match="changed or lost"):
        outcome_of(path.unlink, path)


def test_inputs_follow_from_seed_and_number(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        target = target_class("pickles")(tmp_path)
        target.try_many(3, 11, 1, lambda number, outcome: None)
        contents.append(target.path.read_bytes())
    assert contents[0] == contents[1]
