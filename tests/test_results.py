"""The results that the repository keeps: small, and with where and when they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
COMPILERS = ("nvcc", "triton")
"""Of what is compiled and not run, the compiler stands in place of the machine."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_small_and_with_machine_versions_and_date(path: Path) -> None:
    assert path.stat().st_size < 100_000, "a summary is kept: benchmarks/summary.py, `magnet-fast study`"
    contents = json.loads(path.read_text())
    told = contents.get("machine", contents)
    assert re.match(r"\d{4}-\d\d-\d\d$", told["date"] if isinstance(told["date"], str) else told["date"][-1])
    if any(name in told for name in COMPILERS):
        return
    assert (told.get("gpu") or told["processor"]) and told["torch"]
