"""Random and mutated annotations do no harm; `make fuzz` tries many more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

COUNT = 1500


def test_no_annotation_does_harm() -> None:
    """In a process of its own: no signal, no record that takes for ever, no memory without bound, no wrong mask."""
    command = [sys.executable, "-m", "tests.data.fuzz_segmentations", str(COUNT), "7"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    totals = json.loads(done.stdout.splitlines()[-1])
    assert totals["accepted"] > COUNT / 5 and totals["refused"] > COUNT / 5
    assert sum(totals[key] for key in ("accepted", "refused", "left out or broken")) == COUNT
    assert max(totals["MiB over the start"]) < 1024
