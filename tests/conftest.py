"""With several processes (`pytest -n 2 --dist loadfile`) the tests of a file stay together, as do those that share a
build: what they make for each other is made once."""

from __future__ import annotations

import os
import tempfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU often has no more than pytest
    pass
else:
    # An example that takes over 200 ms is no failure where other processes want the cores.
    too_slow = hypothesis.HealthCheck.too_slow
    hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[too_slow])
    hypothesis.settings.load_profile("tests")

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

_SHARED_BUILDS = ("amx", "cuda")


def pytest_configure(config: pytest.Config) -> None:
    """What kernels prove here, some of them made wrong on purpose, is not remembered for the user; and what a test
    runs on does not hang on a clock, unless it says so."""
    os.environ.setdefault("MAGNET_FAST_CHOICE", "guess")
    if "MAGNET_FAST_CACHE" not in os.environ:  # xdist's processes inherit it
        folder = tempfile.TemporaryDirectory(prefix="magnet_fast-tests-", ignore_cleanup_errors=True)
        os.environ["MAGNET_FAST_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


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
