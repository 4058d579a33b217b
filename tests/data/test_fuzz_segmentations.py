"""6,000 random and mutated annotations do no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_no_annotation_does_harm() -> None:
    """In a process of its own: no signal, no record that takes for ever, no memory without bound, no wrong mask."""
    command = [sys.executable, "-m", "tests.data.fuzz_segmentations", "6000", "7"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    totals = json.loads(done.stdout.splitlines()[-1])
    assert totals["accepted"] > 1200 and totals["refused"] > 1200
    assert sum(totals[key] for key in ("accepted", "refused", "left out or broken")) == 6000
    assert max(totals["MiB over the start"]) < 1024
