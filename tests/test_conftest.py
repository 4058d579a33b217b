"""How `make test` shares the tests among its processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(6))
def test_note(number):
    with pathlib.Path(__file__).with_suffix(".processes").open("a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_files_and_shared_builds_stay_in_one_process(tmp_path: Path) -> None:
    """Else what they make for each other is made twice, the compilation of an emulator before all."""
    tests = tmp_path / "tests"
    names = ("test_a", "test_b", "test_c", "test_d", "cuda/test_a", "cuda/test_b", "amx/test_a", "amx/test_b")
    for name in names:
        file = tests / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(NOTE)
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (command,) = re.findall(r"pytest (tests .*)", (ROOT / "Makefile").read_text())
    command = command.replace("$(TEST_PROCESSES)", "2").split()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    run = [sys.executable, "-m", "pytest", "-p", "xdist", *command]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = defaultdict(list)
    for name in names:
        folder, _, _ = name.rpartition("/")
        found[folder or name] += (tests / f"{name}.processes").read_text().split()
    assert all(len(set(processes)) == 1 for processes in found.values()), found
    assert len({process for processes in found.values() for process in processes}) == 2
