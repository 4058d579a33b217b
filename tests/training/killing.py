"""A run that is killed again and again, for test_killing: forks the run, kills it, resumes it.

python -m tests.training.killing CONFIG OUT SEED: leaves an unbroken run in OUT/whole and the killed one in
OUT/killed; prints a JSON list of what was done to each process: every signal in every moment once, in random order.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from magnet_fast.models import registry
from magnet_fast.training import Trainer, TrainingStopped, load_config, train, validation
from magnet_fast.training.progress import MetricsFile
from magnet_fast.training.stopping import EXIT_STATUS

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
MOMENTS = ("any", "validating", "writing")
"""Whenever the parent comes to it; before the scores of a validation; with half of a file's bytes on the disk."""


def last_step(out: Path) -> int:
    rows = MetricsFile(out / "metrics.jsonl").rows()
    return rows[-1]["step"] if rows else 0


def start(config: str, out: Path, killed: tuple[str, int, int, int] | None = None) -> int:
    """The run, in a process of its own (forked: nothing is imported again); `killed` as `kill_itself` takes it."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        if killed:
            kill_itself(*killed)
        train(load_config(config), out, resume=True)
        status = 0
    except TrainingStopped:
        status = EXIT_STATUS
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_itself(moment: str, number: int, step: int, time: int) -> None:
    """At the `time`th such moment that comes once `step` steps are done."""
    owner, name = {"validating": (validation, "evaluate"), "writing": (os, "fsync")}[moment]
    given, after, left = getattr(owner, name), Trainer._after_step, itertools.count(time, -1)

    def fatal(*arguments: object, **named: object) -> object:
        if next(left) == 1:
            if moment == "writing" and number == signal.SIGKILL:
                os.truncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os.kill(os.getpid(), number)
        return given(*arguments, **named)

    def after_step(self: Trainer) -> None:
        if self.step >= step:
            setattr(owner, name, fatal)
        after(self)

    Trainer._after_step = after_step


def main() -> None:
    config, out, draw = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    registry.systems()  # all imports before the first fork
    assert os.waitstatus_to_exitcode(os.waitpid(start(config, out / "whole"), 0)[1]) == 0
    out = out / "killed"
    total = load_config(config).max_steps
    kills = list(itertools.product(MOMENTS, SIGNALS))
    draw.shuffle(kills)
    done = []
    for moment, number in kills:
        # Somewhere in its share of the steps that are left but for those until the next validation.
        begun = last_step(out)
        wanted = begun + draw.randint(1, max(1, (total - begun - 10) // (len(kills) - len(done))))
        if moment == "any":
            child = start(config, out)
            deadline = time.monotonic() + 120
            while last_step(out) < wanted:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(child, number)
        else:
            # Each file is synchronised, then its folder: the first or the second file.
            time_of = 1 if moment == "validating" else draw.choice((1, 3))
            child = start(config, out, (moment, number, wanted, time_of))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:  # too quick for us, which the last of the kills may meet
            break
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_STATUS), (moment, number.name, status)
        done.append([moment, number.name, wanted])
    assert os.waitstatus_to_exitcode(os.waitpid(start(config, out), 0)[1]) == 0
    print(json.dumps(done))


if __name__ == "__main__":
    main()
