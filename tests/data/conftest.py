"""Embedded scenes shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from magnet_fast.data.scenes import write_scenes


@pytest.fixture(scope="session")
def easy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "easy", 60, seed=3, level="easy")


@pytest.fixture(scope="session")
def hard_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "hard", 120, seed=4, level="hard")
