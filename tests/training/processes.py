"""Python processes of a test: started clean, since forking is only safe where no threads have been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from magnet_fast.models import registry
from magnet_fast.training.distributed import World

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """That of a process that computes on one thread and finds this package and these tests."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def run_module(name: str, *arguments: object, timeout: float = 300) -> str:
    """Run ``python -m tests.training.<name>`` to its end, which must be good; its output."""
    command = [sys.executable, "-m", f"tests.training.{name}", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def in_two_processes(checks: Callable[[Path, World], dict[str, Any]]) -> None:
    """The main program of a module for `run_module`, which is given a folder: `checks` in two Gloo processes.

    What each returns is left in the folder as `found-<rank>.json`.
    """
    out, size = Path(sys.argv[1]), 2
    registry.systems()  # all imports before the first fork
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=size)
                found = checks(out, World(rank, size, torch.device("cpu")))
                (out / f"found-{rank}.json").write_text(json.dumps(found))
                dist.destroy_process_group()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
