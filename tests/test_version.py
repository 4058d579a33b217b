"""One version: of the package, of the installation, and on top of the changes."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import magnet_fast

CHANGES = (Path(__file__).resolve().parents[1] / "CHANGELOG.md").read_text()


def test_the_installation_has_it() -> None:
    assert version("magnet_fast") == magnet_fast.__version__


def test_the_changes_name_it() -> None:
    """Between releases "Unreleased" is on top, and the version is one that has not been released."""
    top, *released = re.findall(r"^## (.*)$", CHANGES, re.MULTILINE)
    assert top == magnet_fast.__version__ or (top == "Unreleased" and magnet_fast.__version__ not in released)
