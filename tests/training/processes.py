"""Python processes of a test: started clean, since forking is only safe where no threads have been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
