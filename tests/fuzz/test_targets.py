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
from tests.fuzz.target import READ, Finding, Target, outcome_of


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
    report = running.run("harm", doing(deed), 5, seed=1, told=False)
    assert report.done == 5 and not report.outcomes[READ]
    ((found, told),) = report.findings.items()
    assert found.startswith(kind) and told["count"] == 5 and told["input"] == 0


def test_a_hang_is_found(monkeypatch) -> None:
    monkeypatch.setattr(running, "SECONDS", 0.2)
    report = running.run("hang", doing(lambda: time.sleep(60)), 1, seed=1, told=False)
    assert list(report.findings) == ["hang"]


def test_what_is_read_is_no_finding() -> None:
    report = running.run("harmless", doing(lambda: None), 4, seed=1, told=False)
    assert report.outcomes[READ] == report.done == 4 and not report.findings


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
