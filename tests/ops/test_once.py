"""Calls whose checks were made before: same answers, same errors, and the choice of backends still counts."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from magnet_fast import ops
from magnet_fast.ops import _cpu_backend, _registry

from .cases import Case, all_cases, window_case

pytestmark = pytest.mark.skipif(_cpu_backend.extension is None, reason=str(_cpu_backend.missing))
NAMES = [
    "cross_modal_attention",
    "deformable_attention",
    "fused_deformable_attention",
    "relative_attention",
    "window_attention",
]


def cases(operator: str) -> list[Case]:
    return [case for case in all_cases(torch.float32).values() if case.operator == operator]


@pytest.fixture
def checks(monkeypatch) -> list[str]:
    """The operators whose arguments were checked; nothing is known when a test begins."""
    made: list[str] = []

    def counting(name: str, prepare):
        return wraps(prepare)(lambda *args, **kwargs: made.append(name) or prepare(*args, **kwargs))

    for name, prepare in list(_registry._prepare.items()):
        monkeypatch.setitem(_registry._prepare, name, counting(name, prepare))
    for name in NAMES:
        item = _registry._implementations[name, "cpu"]
        monkeypatch.setitem(_registry._implementations, (name, "cpu"), _again(item))
    return made


def _again(item: _registry.Implementation, **other) -> _registry.Implementation:
    """Another implementation that does the same: what is known of the one before does not hold for it."""
    fields = {name: getattr(item, name) for name in item.__dataclass_fields__}
    return _registry.Implementation(**{**fields, "supports": lambda *arguments: item.supports(*arguments), **other})


def changed(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().flip(0).clone() for leaf in leaves]


@pytest.mark.parametrize("name", NAMES)
def test_later_calls_are_not_checked_and_agree(name: str, checks: list[str]) -> None:
    for case in cases(name):
        checks.clear()
        with torch.no_grad(), ops.backend("cpu"):
            case()
            assert checks
            checks.clear()
            other = changed(case.leaves)
            found = case(*other)
            assert not checks
        with torch.no_grad(), ops.backend("reference"):
            expected = case(*other)
        assert len(found) == len(expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_tensor_in_two_places_and_then_two(checks: list[str]) -> None:
    first, second, queries = (torch.linspace(-1, stop, 24).view(1, 3, 8) for stop in (1.0, 2.0, 3.0))
    with torch.no_grad():
        ops.cross_modal_attention(queries, first, first)
        found, _ = ops.cross_modal_attention(queries, first, second)
        with ops.backend("reference"):
            expected, _ = ops.cross_modal_attention(queries, first, second)
    torch.testing.assert_close(found, expected)


def test_a_later_wrong_argument_is_still_refused() -> None:
    qkv, table = torch.zeros(1, 4, 4, 6), torch.zeros(9, 1)
    with torch.no_grad():
        ops.window_attention(qkv, table, num_heads=1, window_size=2)
        for named, error in (
            ({"num_heads": True}, "num_heads: expected an int"),
            ({"num_heads": 1.0}, "num_heads: expected an int"),
            ({"num_heads": 4}, "num_heads: 4 heads do not divide"),
        ):
            with pytest.raises((TypeError, ValueError), match=error):
                ops.window_attention(qkv, table, **{"window_size": 2, **named})
        with pytest.raises(ValueError, match="last dimension must be contiguous"):
            ops.window_attention(torch.zeros(1, 4, 6, 4).transpose(2, 3), table, num_heads=1, window_size=2)
        with pytest.raises(TypeError, match="expected a dense tensor"):
            ops.window_attention(qkv.to_sparse(), table, num_heads=1, window_size=2)
        with pytest.raises(TypeError, match="qkv: expected a tensor"):
            ops.window_attention(None, table, num_heads=1, window_size=2)


def test_the_choice_counts_in_every_call(monkeypatch, checks: list[str]) -> None:
    case = window_case(dtype=torch.float32)
    ran: list[str] = []
    item = _registry._implementations["window_attention", "cpu"]

    def forward(*arguments: object) -> Tensor:
        ran.append("cpu")
        return item.forward(*arguments)

    with torch.no_grad():
        case()
        monkeypatch.setitem(_registry._implementations, ("window_attention", "cpu"), _again(item, forward=forward))
        case()
        case()
        assert ran == ["cpu", "cpu"]
        with ops.backend("reference"):
            case()
        monkeypatch.setenv(_registry.ENVIRONMENT_VARIABLE, "reference")
        case()
        assert ran == ["cpu", "cpu"]
        with ops.backend("triton"), pytest.raises(ops.BackendError):
            case()


def test_who_records_sees_the_operator() -> None:
    case, seen = window_case(dtype=torch.float32), []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        case()
        with Looking():
            case()
    assert "magnet_fast.window_attention.default" in seen
    case()
    assert torch.is_grad_enabled()
    assert case()[0].grad_fn is not None


def test_tensors_that_are_not_as_they_lie() -> None:
    """A negative view holds the numbers with the other sign; autocast wants another dtype."""
    qkv, table = torch.linspace(-1, 2, 96).view(1, 4, 4, 6), torch.zeros(9, 1)
    with torch.no_grad():
        ops.window_attention(qkv, table, num_heads=1, window_size=2)
        expected = ops.window_attention(-qkv, table, num_heads=1, window_size=2)
        found = ops.window_attention(torch._neg_view(qkv), table, num_heads=1, window_size=2)
        torch.testing.assert_close(found, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.window_attention(qkv, table, num_heads=1, window_size=2).dtype == torch.bfloat16
