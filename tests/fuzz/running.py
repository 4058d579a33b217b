"""Batches of inputs in child processes: a death by a signal, a hang and every other finding is told with its input."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.target import READ, REFUSED, Target, watch_for_code

SECONDS = 60
"""Of a child's own work without an input done: it has hung. Ten times as long by the clock, for one that waits."""
_OUTCOMES = (READ, REFUSED)
_STATE = struct.Struct("<qqqq")  # the input at work, inputs done, read, refused
_LONGEST = 400


@dataclass
class Report:
    """What came of a target's inputs.

    Attributes:
        outcomes: how many were read and refused.
        findings: by what is alike in them: a description of the first, its input and how many there were.
    """

    target: str
    seed: int
    done: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, number: int, told: str) -> None:
        found = self.findings.setdefault(kind, {"input": number, "told": told[:_LONGEST], "count": 0})
        found["count"] += 1

    def summary(self) -> dict[str, Any]:
        """As plain entries."""
        counts = {"inputs": self.done, **{outcome: self.outcomes[outcome] for outcome in _OUTCOMES}}
        return {**counts, "seconds": round(self.seconds, 1), "findings": self.findings}


def run(name: str, target: type[Target], count: int, seed: int, first: int = 0, *, told: bool = True) -> Report:
    """Try inputs number `first` to `first + count` of a target, a batch in each child process."""
    report, began = Report(name, seed), time.monotonic()
    place, end = first, first + count
    while place < end:
        place = _batch(report, target, seed, place, min(target.batch, end - place))
        report.seconds = time.monotonic() - began
        if told:
            print(f"{name}: {place - first} of {count}, {dict(report.outcomes)}", file=sys.stderr, flush=True)
    return report


def _batch(report: Report, target: type[Target], seed: int, first: int, count: int) -> int:
    """One child; the number of the input after the last one that it tried."""
    state = mmap.mmap(-1, _STATE.size)
    state[:] = _STATE.pack(first, 0, 0, 0)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{report.target}-"))
    notes = folder / "findings.jsonl"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _work(target, folder, seed, first, count, state, notes)
            status = 0
        except BaseException:  # the target itself, not an input
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status, hung = _wait(child, state)
    number, done, read, refused = _STATE.unpack(state[:])
    report.done += done
    report.outcomes.update({READ: read, REFUSED: refused})
    for line in notes.read_text().splitlines() if notes.exists() else ():
        note = json.loads(line)
        report.add(note["kind"], note["input"], note["told"])
    shutil.rmtree(folder, ignore_errors=True)
    if hung:
        report.add("hang", number, f"not done after {SECONDS} s of work")
    elif os.WIFSIGNALED(status):
        report.add(f"signal {os.WTERMSIG(status)}", number, signal.Signals(os.WTERMSIG(status)).name)
    elif status:
        raise RuntimeError(f"{report.target}: the target failed at input {number} of seed {seed}; see above")
    else:
        return first + count
    report.done += 1
    return number + max(1, target.together)


def _work(target: type[Target], folder: Path, seed: int, first: int, count: int, state: mmap.mmap, notes: Path) -> None:
    faulthandler.enable() if count == 1 else faulthandler.disable()  # to look at one; of many the inputs are told
    os.environ["HF_HUB_OFFLINE"] = "1"
    counts = Counter()
    inputs = folder / "inputs"
    inputs.mkdir()
    os.chdir(inputs)
    trying = target(inputs)
    if target.memory:
        limit = _data_memory() + target.memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch_for_code()

    def done(number: int, outcome: str | BaseException) -> None:
        if isinstance(outcome, BaseException):
            with notes.open("a") as file:
                file.write(json.dumps({"input": number, **_described(outcome)}) + "\n")
        else:
            counts[outcome] += 1
        following = number + 1
        state[:] = _STATE.pack(following, following - first, counts[READ], counts[REFUSED])

    with contextlib.redirect_stdout(sys.stderr):
        trying.try_many(seed, first, count, done)


def _described(error: BaseException) -> dict[str, str]:
    """What findings of one cause have in common, and the first in full."""
    cause = error.__cause__ or error if type(error).__name__ == "Finding" else error
    frames = traceback.extract_tb(cause.__traceback__)
    inner = [frame for frame in frames if "/magnet_fast/" in frame.filename]
    where = f"{Path(inner[-1].filename).name}:{inner[-1].name}" if inner else "outside"
    told = " ".join(f"{type(error).__name__}: {error}".split()).encode("ascii", "backslashreplace").decode()
    told_kind = re.split(r"[:\[(]| '", told.partition(": ")[2])[0]
    kind = told_kind[:60] if type(error).__name__ in ("Finding", "_Forbidden") else ""
    return {"kind": f"{type(error).__name__} in {where} {kind}".strip(), "told": told[:_LONGEST]}


def _wait(child: int, state: mmap.mmap) -> tuple[int, bool]:
    """The child's status, and whether it was ended since nothing came of it any more."""
    before, since, worked = bytes(state[:]), time.monotonic(), _work_of(child)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status, False
        time.sleep(0.02)
        if (now := bytes(state[:])) != before:
            before, since, worked = now, time.monotonic(), _work_of(child)
        elif time.monotonic() - since > SECONDS and (
            time.monotonic() - since > 10 * SECONDS or _work_of(child) - worked > SECONDS
        ):
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True


def _work_of(child: int) -> float:
    """Seconds that a process has computed, others not counted."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _data_memory() -> int:
    """Bytes of private memory that may be written."""
    return 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
