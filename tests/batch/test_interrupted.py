"""Ctrl-C in a batch as a person presses it, and ends without a warning: signals to another process, in mid-work."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow  # two processes that load the model

ROWS = 90


@pytest.fixture
def command(pictures: Path, checkpoint: Path, tmp_path: Path) -> list[str]:
    with open(pictures / "rows.csv", "w", newline="") as file:
        rows = [
            ("abc"[number % 3] + (".jpg" if number % 3 == 1 else ".png"), f"thing {number}") for number in range(ROWS)
        ]
        csv.writer(file).writerows([("image", "sentence"), *rows])
    words = ["segment", "--input", pictures / "rows.csv", "--out", tmp_path / "out", "--checkpoint", checkpoint]
    return [sys.executable, "-m", "magnet_fast", *map(str, words), "--device", "cpu", "--batch-size", "1"]


def listening() -> None:
    """Tests that run in a shell's background are deaf to Ctrl-C, and so are the processes they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def whole_lines(out: Path) -> list[dict]:
    lines = out / "results.jsonl"
    content = lines.read_bytes() if lines.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_done_stays_whole_and_resume_does_the_rest(number: int, command: list[str], tmp_path: Path) -> None:
    out, environment = tmp_path / "out", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )
    try:
        while len(whole_lines(out)) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    done = whole_lines(out)
    assert 3 <= len(done) < ROWS
    if number == signal.SIGINT:
        assert process.returncode == 130, errors
        assert errors == f"stopped: {len(done)} of {ROWS} rows are done; the same command with --resume goes on\n"
        assert not list(out.rglob("*.tmp"))
        assert (out / "results.jsonl").read_bytes().endswith(b"\n")
    else:
        assert process.returncode == -number, errors
    written = {path.name for path in (out / "masks").glob("[!.]*")}
    # A mask may be there whose line was not written yet: one, and it is whole.
    assert {Path(line["mask"]).name for line in done} <= written and len(written) <= len(done) + 1
    for path in (out / "masks").glob("[!.]*"):
        Image.open(path).load()
    times = {line["mask"]: (out / line["mask"]).stat().st_mtime_ns for line in done}

    finished = subprocess.run(
        [*command[:-1], "8", "--resume"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{out}: {ROWS} of {ROWS} rows, {len(done)} of them before\n"
    lines = whole_lines(out)
    assert sorted(line["row"] for line in lines) == list(range(1, ROWS + 1))
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times  # not done again
