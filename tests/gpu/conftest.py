"""Tests of the kernels on a GPU; elsewhere they are skipped, in one line that says so."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu-check"))
