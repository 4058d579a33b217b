"""The choice by measurement, with the device's own clock."""

from __future__ import annotations

import pytest
import torch

from magnet_fast import ops
from magnet_fast.ops import _kept, _registry, _trial
from tests.ops.cases import all_cases

from .device import on_gpu


@pytest.mark.parametrize("name", ["window", "relative", "cross-modal, shared", "fused deformable", "contrastive"])
@pytest.mark.parametrize("gradients", [False, True])
def test_measured_once(name: str, gradients: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(_kept.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(_trial.MODE_VARIABLE, raising=False)
    monkeypatch.delenv(_registry.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_trial, "_forms", {})
    monkeypatch.setattr(_trial, "_choices", {})
    case = on_gpu(all_cases(torch.float32)[name])
    with torch.set_grad_enabled(gradients):
        ours = case()
        with ops.backend("reference"):
            plain = case()
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
        (found,) = _trial._choices.values()
        assert {"triton", "reference"} <= found.seconds.keys() and found.failed == {}, found
        args, kwargs = case.arguments(*case.leaves)
        explained = ops.explain(case.operator, *args, **kwargs)
        assert explained.chosen == found.winner and "measured 2" in explained.measured
        _trial._forms.clear()
        monkeypatch.setattr(_trial, "_measured", None)
        case()
