"""Checks in a process of their own, on the device."""

from __future__ import annotations

import json

import pytest
import torch

from magnet_fast import ops
from magnet_fast.ops import _kept, _proof, _proof_apart
from tests.ops.apart import DEEDS, OPERATOR


@pytest.fixture(autouse=True)
def unknown(monkeypatch, tmp_path) -> None:
    """Nothing is known of any kernel, and none may be checked in this process."""
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(_proof.MODE_VARIABLE, raising=False)
    monkeypatch.setattr(_proof, "_verdicts", {})
    monkeypatch.setattr(_proof, "check", lambda *place: pytest.fail("checked in the process that asks"))


def test_every_kernel_proves_itself_there() -> None:
    ops.prove("cuda", (torch.float32, torch.bfloat16))
    failed = {place: verdict for place, verdict in _proof._verdicts.items() if not verdict.passed}
    assert len(_proof._verdicts) >= len(_proof.OPERATORS) * 2 and failed == {}


def test_one_that_breaks_the_gpu_for_its_process(monkeypatch) -> None:
    """The GPU goes on in this one, and the checks after it in another."""
    monkeypatch.setattr(
        _proof_apart, "_START", _proof_apart._START.replace("magnet_fast.ops._proof_child", "tests.ops.apart")
    )
    monkeypatch.setenv(DEEDS, json.dumps({"float32": "asserts", "bfloat16": "right"}))
    with pytest.warns(UserWarning, match="triton kernel of window_attention could not be checked in float32"):
        ops.prove("cuda", (torch.float32, torch.bfloat16), (OPERATOR,))
    found = {place[2]: verdict for place, verdict in _proof._verdicts.items() if place[1] == "triton"}
    assert found["float32"].lasting and "CUDA error" in found["float32"].detail and found["bfloat16"].passed
    assert torch.ones(2, device="cuda").sum().item() == 2
