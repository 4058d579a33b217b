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
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.target import READ, REFUSED, Target, watch_for_code

SECONDS = 60
"""Of a child's own work without an input done: it has hung. Ten times as long by the clock, for one that waits."""
_OUTCOMES = (READ, REFUSED)
_STATE = struct.Struct("<qqqq")  # the input at work, inputs done, read, refused
_LONGEST = 400


Range = tuple[int, int]


@dataclass
class Report:
    """What came of a target's inputs.

    Attributes:
        outcomes: how many were read and refused.
        findings: by what is alike in them: a description of the first, its input and how many there were.
        left: numbers of the inputs that were not tried yet, each from and up to.
    """

    target: str
    seed: int
    left: list[Range] = field(default_factory=list)
    done: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, number: int, told: str) -> None:
        found = self.findings.setdefault(kind, {"input": number, "told": told[:_LONGEST], "count": 0})
        found["count"] += 1

    def summary(self) -> dict[str, Any]:
        """As plain entries; `left` where there is something."""
        counts = {"inputs": self.done, **{outcome: self.outcomes[outcome] for outcome in _OUTCOMES}}
        left = {"left": self.left} if self.left else {}
        return {"seed": self.seed, **counts, "seconds": round(self.seconds, 1), "findings": self.findings, **left}

    @classmethod
    def of(cls, target: str, summary: dict[str, Any]) -> Report:
        """What `summary` gave: to go on with."""
        outcomes = Counter({outcome: summary[outcome] for outcome in _OUTCOMES})
        left = [(first, end) for first, end in summary.get("left", [])]
        done, seconds = summary["inputs"], summary["seconds"]
        return cls(target, summary["seed"], left, done, seconds, outcomes, summary["findings"])


def run(
    report: Report,
    target: type[Target],
    workers: int = 1,
    *,
    told: bool = True,
    kept: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Try the inputs that a report has left, a batch in each child process.

    Args:
        report: is filled; its `seconds` are those of all children together.
        target: what tries them.
        workers: children at once.
        told: print where it stands after each batch.
        kept: called after each batch. What is going on at the time is among the inputs that are left, so that nothing
            is left out by whoever goes on from there.
    """
    waiting, going = deque(report.left), list[_Batch]()
    total = report.done + sum(end - first for first, end in waiting)
    try:
        while waiting or going:
            while waiting and len(going) < workers:
                first, end = waiting.popleft()
                stop = min(first + target.batch, end)
                if stop < end:
                    waiting.appendleft((stop, end))
                going.append(_Batch(report.target, target, report.seed, first, stop))
            time.sleep(0.02)
            for batch in [batch for batch in going if batch.has_ended()]:
                going.remove(batch)
                following = batch.conclude(report)
                if following < batch.end:  # it died at an input
                    waiting.appendleft((following, batch.end))
                report.left = sorted([*((one.first, one.end) for one in going), *waiting])
                kept(report)
                if told:
                    said = f"{report.target}: {report.done} of {total}, {dict(report.outcomes)}"
                    print(said, file=sys.stderr, flush=True)
    finally:
        for batch in going:
            batch.give_up()
    return report


class _Batch:
    """A child process that tries the inputs from `first` up to `end`."""

    def __init__(self, name: str, target: type[Target], seed: int, first: int, end: int) -> None:
        self.first, self.end, self.together, self.seed = first, end, target.together, seed
        self.state = mmap.mmap(-1, _STATE.size)
        self.state[:] = _STATE.pack(first, 0, 0, 0)
        self.folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        self.notes = self.folder / "findings.jsonl"
        self.status, self.ended, self.hung, self.began = 0, False, False, time.monotonic()
        self.child = os.fork()
        if self.child == 0:
            status = 1
            try:
                for number in (signal.SIGINT, signal.SIGTERM):  # the parent ends it
                    signal.signal(number, signal.SIG_IGN)
                _work(target, self.folder, seed, first, end - first, self.state, self.notes)
                status = 0
            except BaseException:  # the target itself, not an input
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        self.before, self.since, self.worked = bytes(self.state[:]), time.monotonic(), _work_of(self.child)

    def has_ended(self) -> bool:
        """Whether the child has; it is ended here once nothing comes of it any more."""
        found, self.status = os.waitpid(self.child, os.WNOHANG)
        self.ended = found != 0
        if self.ended:
            return True
        if (now := bytes(self.state[:])) != self.before:
            self.before, self.since, self.worked = now, time.monotonic(), _work_of(self.child)
        silent = time.monotonic() - self.since
        if silent > SECONDS and (silent > 10 * SECONDS or _work_of(self.child) - self.worked > SECONDS):
            self.ended = self.hung = True
            os.kill(self.child, signal.SIGKILL)
            self.status = os.waitpid(self.child, 0)[1]
        return self.ended

    def conclude(self, report: Report) -> int:
        """Add what came of it to the report; the number of the input after the last one that it tried."""
        number, done, read, refused = _STATE.unpack(self.state[:])
        report.done += done
        report.seconds += time.monotonic() - self.began
        report.outcomes.update({READ: read, REFUSED: refused})
        for line in self.notes.read_text().splitlines() if self.notes.exists() else ():
            note = json.loads(line)
            report.add(note["kind"], note["input"], note["told"])
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.hung:
            report.add("hang", number, f"not done after {SECONDS} s of work")
        elif os.WIFSIGNALED(self.status):
            ended_by = os.WTERMSIG(self.status)
            report.add(f"signal {ended_by}", number, signal.Signals(ended_by).name)
        elif self.status:
            raise RuntimeError(f"{report.target}: the target failed at input {number} of seed {self.seed}; see above")
        else:
            return self.end
        report.done += 1
        return number + max(1, self.together)

    def give_up(self) -> None:
        """End the child, where it has not ended by itself; nothing of what it did counts."""
        if not self.ended:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


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


def _work_of(child: int) -> float:
    """Seconds that a process has computed, others not counted."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _data_memory() -> int:
    """Bytes of private memory that may be written."""
    return 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
