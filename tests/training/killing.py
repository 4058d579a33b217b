"""A run that is killed again and again, for test_killing: forks the run, kills it at random moments, resumes it.

python -m tests.training.killing CONFIG OUT KILLS SEED: leaves an unbroken run in OUT/whole and the killed one in
OUT/killed; prints a JSON list of what was done to each process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from magnet_fast.training import TrainingStopped, load_config, train
from magnet_fast.training.progress import MetricsFile
from magnet_fast.training.stopping import EXIT_STATUS


def last_step(out: Path) -> int:
    rows = MetricsFile(out / "metrics.jsonl").rows()
    return rows[-1]["step"] if rows else 0


def start(config: str, out: Path) -> int:
    """The run, in a process of its own (forked: nothing is imported again)."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        train(load_config(config), out, resume=True)
        status = 0
    except TrainingStopped:
        status = EXIT_STATUS
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    config, out, kills, draw = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    assert os.waitstatus_to_exitcode(os.waitpid(start(config, out / "whole"), 0)[1]) == 0
    out = out / "killed"
    total = load_config(config).max_steps
    done = []
    while len(done) < kills:
        # Somewhere in its share of the steps that are left but for a few, at any moment of a step or of writing.
        begun = last_step(out)
        wanted = begun + draw.randint(1, max(1, (total - begun - 6) // (kills - len(done))))
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        child = start(config, out)
        deadline = time.monotonic() + 120
        while last_step(out) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:  # too quick for us, which the last of the kills may meet
            break
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_STATUS), status
        done.append([number.name, wanted])
    assert os.waitstatus_to_exitcode(os.waitpid(start(config, out), 0)[1]) == 0
    print(json.dumps(done))


if __name__ == "__main__":
    main()
