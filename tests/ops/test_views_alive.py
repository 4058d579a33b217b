"""What a kernel reads lives until the call is over: a view of a tensor holds an address, and keeps nothing alive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend, _int8, _winograd

_DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, 3: torch.float64, 5: torch.uint8}


class _Overwriting:
    """The extension, before each call of which memory that is free by then is written to."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.extension, name)
        if not callable(found):
            return found

        def called(**arguments: Any) -> Any:
            views = [value for value in arguments.values() if isinstance(value, tuple) and len(value) == 4]
            kept = [torch.full(sizes, 77, dtype=_DTYPES[dtype]) for _, sizes, _, dtype in views for _ in range(4)]
            result = found(**arguments)
            del kept
            return result

        return called if found.__name__ != "simd_level" else found


@pytest.fixture
def overwriting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_cpu_backend, "extension", _Overwriting(_cpu_backend.extension))
    yield


def strided(*shape: int) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0))[..., ::2]


def test_the_check_itself(overwriting: None) -> None:
    """An address of a copy that is gone: its numbers are others by the time of the call."""
    from magnet_fast.ops._view import view

    x, packed, y = torch.ones(1, 4, 4, 16), _winograd.pack(torch.ones(16, 16, 3, 3)), torch.empty(1, 4, 4, 16)
    gone = view(torch.ones(1, 4, 4, 16) + 0)
    arguments = {"packed": view(packed), "bias": None, "residual": None, "rectify": False, "threads": 1}
    _cpu_backend.extension.winograd_forward(x=view(x), y=view(y), **arguments)
    right = y.clone()
    _cpu_backend.extension.winograd_forward(x=gone, y=view(y), **arguments)
    assert not torch.equal(y, right)


def test_winograd(overwriting: None) -> None:
    weight = torch.randn(16, 16, 3, 3).to(memory_format=torch.channels_last)
    x, residual = strided(1, 6, 7, 16).permute(0, 3, 1, 2), strided(1, 6, 7, 16).permute(0, 3, 1, 2)
    found = _winograd.run(x, _winograd.pack(weight), None, residual)
    expected = torch.nn.functional.conv2d(x, weight, padding=1) + residual
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not _int8.works(), reason="no int8 product in PyTorch here")
def test_int8(overwriting: None) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    x, bias, residual = torch.randn(5, 64), strided(32), strided(5, 32)
    packed = _int8.quantise(weight, 5)
    expected = _int8.linear(x, packed, bias.contiguous(), None, residual.contiguous())
    assert torch.equal(_int8.linear(x, packed, bias, None, residual), expected)
