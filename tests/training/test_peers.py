"""Two processes of torchrun, one of which is killed or stands still: the run ends as an undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.progress import MetricsFile

from .fakes import same_weights
from .processes import REPOSITORY, environment

pytestmark = pytest.mark.slow


def launched(out: Path, case: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return subprocess.run(
        [*torchrun, *more, "-m", "tests.training.peers", str(out), case],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peers") / "whole"
    done = launched(out, "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def same_run(out: Path, other: Path) -> bool:
    one, two = (load_checkpoint(folder / CHECKPOINT) for folder in (out, other))
    rows = [[(row["kind"], row["step"]) for row in MetricsFile(f / "metrics.jsonl").rows()] for f in (out, other)]
    return same_weights(one["model"], two["model"]) and one["step"] == two["step"] == 9 and rows[0] == rows[1]


def test_one_of_two_is_killed_and_torchrun_starts_both_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = launched(out, "killed", restarts=1)  # one is enough: nobody meets the addresses of the dead
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 3" in done.stdout
    assert same_run(whole, out)
    (told,) = (out / "told.txt").read_text().splitlines()  # by the other one, which did not wait for ever
    assert told.startswith("another process of the run has ended, or cannot be reached; its own output says why (")
    assert told.endswith(f"; {out / CHECKPOINT} holds step 3, --resume goes on")


def test_one_of_two_is_killed_and_the_run_is_started_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert launched(out, "killed").returncode != 0
    assert load_checkpoint(out / CHECKPOINT)["step"] == 3
    assert launched(out, "killed").returncode == 0
    assert same_run(whole, out)


def test_one_of_two_stands_still_for_a_while(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = launched(out, "frozen")
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_run(whole, out)
