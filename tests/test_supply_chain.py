"""What an installation brings, and what CI runs: locked by hashes, licensed, pinned by commit, on every Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.versions import floors, requirements, tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCK = (ROOT / "requirements" / "test.lock").read_text()
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def direct(*extras: str) -> list[Requirement]:
    """The package's own dependencies, those of extras among them."""
    lines = [Requirement(line) for line in (*requirements(), *(line for extra in extras for line in EXTRAS[extra]))]
    own = [one for one in lines if canonicalize_name(one.name) == "magnet-fast"]
    return [one for one in lines if one not in own] + [one for more in own for one in direct(*more.extras)]


def entries() -> list[tuple[Requirement, list[str]]]:
    """The lock's pins with their hashes."""
    found = []
    for block in re.split(r"\n(?=[a-z])", LOCK.strip()):
        line, *hashes = (part.strip() for part in block.split("\\\n"))
        found.append((Requirement(line), hashes))
    return found


def test_the_lock_names_every_dependency_by_version_and_hashes() -> None:
    pins: dict[str, list[Requirement]] = {}
    for pin, hashes in entries():
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin
        assert [one.operator for one in pin.specifier] == ["=="], pin
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for wanted in direct("test"):
        for python in PYTHONS:
            environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
            if wanted.marker is not None and not wanted.marker.evaluate(environment):
                continue
            here = [p for p in pins[canonicalize_name(wanted.name)] if not p.marker or p.marker.evaluate(environment)]
            (version,) = (str(next(iter(pin.specifier)).version) for pin in here)
            assert wanted.specifier.contains(version), f"make lock: {wanted} on Python {python}, locked at {version}"


def test_the_lock_names_no_host() -> None:
    assert not re.search(r"://|--(extra-)?index-url|--find-links|\bfile:", LOCK)


def test_every_dependency_has_a_floor() -> None:
    """The oldest versions are tested: `make versions`."""
    named = {line.split("==")[0] for line in floors(requirements())}
    assert {one.name for one in map(Requirement, requirements())} - named == {"triton"}  # comes with torch


def test_every_dependency_has_a_licence_on_its_page() -> None:
    rows = re.findall(r"^\| (?!package)([a-z0-9-]+) \| (.+) \|$", (ROOT / "docs" / "licences.md").read_text(), re.M)
    told = dict(rows)
    assert len(told) == len(rows) > 50
    lacking = {canonicalize_name(one.name) for one in direct("app", "export", "superpixels")} - told.keys()
    assert not lacking, "make licences"


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_actions_are_pinned_by_commit(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / name).read_text()
    used = re.findall(r"uses: (.+)", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in used)


def test_every_supported_python_is_tested_and_built_for() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    check = [
        step["with"]["python-version"] for step in jobs["check"]["steps"] if "setup-python" in step.get("uses", "")
    ]
    assert sorted(check + jobs["pythons"]["strategy"]["matrix"]["python"], key=PYTHONS.index) == PYTHONS
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    built = release["wheels"]["strategy"]["matrix"]["python"]
    assert built == ["cp" + one.replace(".", "") for one in PYTHONS]
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert PROJECT["tool"]["cibuildwheel"]["build"] == "cp31{0,1,2,3,4}-manylinux_x86_64"


def test_floors_are_pins_of_what_has_one() -> None:
    assert floors(["torch>=2.11", "pillow", "triton; sys_platform == 'linux'", "a_b>=1.0.3,<2"]) == [
        "torch==2.11",
        "a_b==1.0.3",
    ]
