"""The tests with the oldest versions of the dependencies that pyproject.toml allows, and with the newest there are.

python -m tests.versions FOLDER [--end oldest] [TESTS …]: makes an environment and a copy of the sources for each end in
the folder, installs the package there, runs the tests that are not slow, and leaves `report.json` with versions and
numbers. What has no floor is at its newest in both. With the newest, what they call deprecated is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("oldest", "newest")
TESTS = [f"tests/{name}" for name in ("ops", "kernels", "models", "fast", "data", "training", "evaluation", "batch")]
TESTS += [f"tests/test_{name}.py" for name in ("cli", "default_device", "hub", "inference")]
# What those tests need beside the package.
TOOLS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "peft",
    "segment-anything",
    "segment-anything-hq",
    "scikit-image",
    "pytest-benchmark",
)
BUILD = ("setuptools>=77", "pybind11>=2.12", "ninja")


def requirements() -> list[str]:
    """The dependencies of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def floors(lines: list[str]) -> list[str]:
    """Each dependency with a floor, pinned to it."""
    found = [re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", line) for line in lines]
    return [f"{one[1]}=={one[2]}" for one in found if one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--end", choices=ENDS, action="append", help="one of the two; default: both")
    parser.add_argument("tests", nargs="*", default=TESTS)
    given = parser.parse_intermixed_args()  # tests may follow an option
    folder = given.folder.resolve()
    report = {end: checked(folder / end, end, given.tests) for end in given.end or ENDS}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for end, found in report.items():
        named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        print(f"{end}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped; {named}")
    sys.exit(any(found["failed"] or not found["passed"] for found in report.values()))


def checked(folder: Path, end: str, tests: list[str]) -> dict[str, Any]:
    """Environment, sources and tests of one end; its versions and numbers."""
    python = folder / "env" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "env", with_pip=True)
    lines = requirements()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(floors(lines) if end == "oldest" else []) + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", "-c", constraints, *lines, *TOOLS, *BUILD], check=True)
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(
        b"\0"
    ):
        if name and (ROOT / os.fsdecode(name)).exists():
            (source / os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / os.fsdecode(name), source / os.fsdecode(name))
    settings = {**os.environ, "MAGNET_FAST_CUDA": "0", "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONPATH", None)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", source], env=settings, check=True)
    results = folder / "results.xml"
    results.unlink(missing_ok=True)  # of an earlier run
    side = ["-n", os.environ.get("TEST_PROCESSES", "2"), "--dist", "loadfile"]
    pytest = [python, "-m", "pytest", "-m", "not slow", "-q", *side, f"--junitxml={results}"]
    strict = ["-p", "tests.deprecations"] if end == "newest" else []
    code = subprocess.run([*pytest, *strict, *tests], cwd=source, env=settings).returncode
    if code not in (0, 1):  # passed, failed
        raise SystemExit(f"{end}: pytest ended with {code}")
    (suite,) = ElementTree.parse(results).getroot()
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "versions": versions(python, lines),
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }


def versions(python: Path, lines: list[str]) -> dict[str, str]:
    """Python's own, and those of the dependencies."""
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    code = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(["Python", *names], done.stdout.split(), strict=True))


if __name__ == "__main__":
    main()
