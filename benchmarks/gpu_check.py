"""Everything that needs a GPU, in one command and without a network: python -m benchmarks.gpu_check

Tests of the kernels on the device (tests/gpu), in which every kernel proves itself; the same on a few shapes under
compute-sanitizer where there is one; and the benchmarks, of kernels and of whole models, with their results files and
picture. Nothing is installed: the Triton kernels are found in the checkout, and where there are nvcc and pybind11 the
extensions are built in it first. What matters most comes first, and all of it ends in time (`--minutes`).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).parent.parent


def find_kernels() -> None:
    """Make `magnet_fast.kernels` importable in a checkout that was not installed: it is the top folder kernels/."""
    link = ROOT / "magnet_fast" / "kernels"
    if importlib.util.find_spec("magnet_fast.kernels") is None:
        link.symlink_to(Path("..", "kernels"), target_is_directory=True)


def commands(results: Path, picture: Path, models: Path) -> list[list[str]]:
    """What is run, one after the other: the slowest checks last."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    found = [tests]
    if shutil.which("nvcc") and importlib.util.find_spec("pybind11"):
        found.insert(0, ["env", "MAGNET_FAST_CUDA=1", sys.executable, "setup.py", "build_ext", "--inplace"])
    sanitizer, slow = shutil.which("compute-sanitizer"), []
    if sanitizer:
        sanitized = [sanitizer, "--error-exitcode", "1", "--tool"]
        found.append([*sanitized, "memcheck", *tests, "-k", "agrees"])
        slow = [[*sanitized, tool, *tests, "-k", "agrees and (odd or crowded)"] for tool in ("racecheck", "initcheck")]
    found.append([sys.executable, "-m", "benchmarks.gpu", "--results", str(results), "--picture", str(picture)])
    found.append([sys.executable, "-m", "benchmarks.gpu_models", "--results", str(models)])
    found += slow
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "benchmarks-gpu.png")
    parser.add_argument("--models", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_models.json")
    parser.add_argument("--minutes", type=float, default=12, help="after which what is left is not run")
    options = parser.parse_args()
    find_kernels()
    failed = run(commands(options.results, options.picture, options.models), monotonic() + 60 * options.minutes)
    if failed:
        raise SystemExit("gpu_check: failed:\n  " + "\n  ".join(failed))


def run(todo: list[list[str]], end: float) -> list[str]:
    """Run commands until the clock says `end`; those that failed, were stopped or had no time left."""
    failed = []
    for command in todo:
        said = " ".join(command)
        if monotonic() >= end:
            failed.append(f"{said} (not begun: the time is over)")
            continue
        print("+", *command, flush=True)
        try:
            if subprocess.run(command, cwd=ROOT, timeout=end - monotonic()).returncode:
                failed.append(said)
        except subprocess.TimeoutExpired:
            failed.append(f"{said} (stopped: the time is over)")
    return failed


if __name__ == "__main__":
    main()
