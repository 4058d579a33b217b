"""Fixtures of several files: a device that stands in for a GPU, a packed Linear, and what is packed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from magnet_fast.ops import _linear, _packed
from magnet_fast.ops._linear import pack_linear

from .stand_in import machine  # noqa: F401 - a fixture


@pytest.fixture
def packed_layer() -> Iterator[nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(96, 80)
    pack_linear(layer)
    yield layer
    _packed.unpack(layer)


@pytest.fixture
def packings(monkeypatch) -> list[Tensor]:
    """Every weight of a Linear that was packed."""
    for dtype in (torch.float32, torch.bfloat16):
        _linear._works(dtype)  # which packs one, once in a process
    found = []
    pack = torch.ops.mkldnn._reorder_linear_weight
    operators = SimpleNamespace(
        _reorder_linear_weight=lambda weight, rows: found.append(weight) or pack(weight, rows),
        _linear_pointwise=torch.ops.mkldnn._linear_pointwise,
    )
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    return found
