"""With several processes (`pytest -n 2 --dist loadgroup`) the tests of a file stay together, as do those that share a
build: what they make for each other is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED_BUILDS = ("amx", "cuda")


@pytest.hookimpl(tryfirst=True)  # before the hook that reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests run in one process, and put the slow files first: one that starts last is waited for."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        folder = Path(item.path).parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in _SHARED_BUILDS else str(item.path)))
