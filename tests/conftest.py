"""With several processes (`pytest -n 2 --dist loadfile`) the tests of a file stay together, as do those that share a
build: what they make for each other is made once."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

_SHARED_BUILDS = ("amx", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first: one that starts last is waited for."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)  # xdist may be absent
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadFileScheduling | None:
    """Say which tests run in one process. xdist's own groups, `--dist loadgroup`, are silently none with pytest 9.2."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            folder = PurePosixPath(file).parent
            return str(folder) if folder.name in _SHARED_BUILDS else file

    return Together(config, log)
