"""Two processes of a run, one of which is killed or frozen, for test_peers.

torchrun … -m tests.training.peers OUT CASE: the case is "whole", "killed" or "frozen". A run goes on from what OUT
holds; the errors that the end of the other process brought are left in OUT/told.txt, a line each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from magnet_fast.training.distributed import distributed_world, gather_objects
from magnet_fast.training.folder import held_folder
from magnet_fast.training.run import state_to_resume

from .two_processes import fake_trainer

CHANGES = {"checkpoint_every": 3, "log_every": 1}
FROZEN_SECONDS = 60


def main() -> None:
    out, case = Path(sys.argv[1]), sys.argv[2]
    try:
        with distributed_world("cpu") as world, held_folder(out, world):
            trainer = fake_trainer(out, world, **CHANGES)
            state = state_to_resume(trainer.config, out, True, False, world)
            if state is not None:
                trainer.load_state(state)
            after, processes = trainer._after_step, gather_objects(os.getpid(), world)

            def disturb() -> None:
                if trainer.step == 5 and case == "killed" and world.rank == 1 and state is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                if trainer.step == 5 and case == "frozen" and world.rank == 0:
                    os.kill(processes[1], signal.SIGSTOP)
                    subprocess.Popen(["sh", "-c", f"sleep {FROZEN_SECONDS}; kill -CONT {processes[1]}"])
                after()

            trainer._after_step = disturb
            trainer.run()
    except ConnectionError as error:
        with (out / "told.txt").open("a") as file:
            file.write(f"{error}\n")
        raise


if __name__ == "__main__":
    main()
