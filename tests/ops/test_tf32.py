"""Whether float32 products may be of TF32: PyTorch's older and its newer setting, neither of which may be missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from magnet_fast import ops
from magnet_fast.ops import _cuda_backend, _kept, _proof

from .apart import OPERATOR
from .cases import window_case
from .stand_in import chosen
from .test_proof_apart import children, fake  # noqa: F401 - fixtures


def newer(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def newer_for_all(value: str) -> None:
    torch.backends.fp32_precision = value


def older(value: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value == "tf32"


def oldest(value: str) -> None:
    torch.set_float32_matmul_precision("high" if value == "tf32" else "highest")


SETTINGS = [newer, newer_for_all, older, oldest]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    assert not torch.backends.cuda.matmul.allow_tf32  # which the mixture of both would refuse to say


@pytest.fixture
def a_gpu(monkeypatch) -> None:
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("allow", SETTINGS)
def test_either_setting_is_seen(allow: Callable, a_gpu) -> None:
    keys = [_kept.machine(torch.device("cuda", 0))]
    assert not _cuda_backend.tf32()
    allow("tf32")
    assert _cuda_backend.tf32()
    keys.append(_kept.machine(torch.device("cuda", 0)))
    assert [key["tf32"] for key in keys] == [False, True]
    allow("ieee")
    assert not _cuda_backend.tf32()


@pytest.mark.parametrize("allow", SETTINGS)
def test_a_choice_is_made(allow: Callable, machine) -> None:
    allow("tf32")
    case = window_case(dtype=torch.float32)
    args, kwargs = case.arguments(*case.leaves)
    assert "not measured yet" in str(ops.explain(OPERATOR, *args, **kwargs))
    assert chosen(case) == "cpu" and len(machine.answers()) == 1


def test_a_check_is_made(fake, children) -> None:  # noqa: F811
    made = fake()
    newer("tf32")
    children.do(float32="right")
    ops.prove("cpu", (torch.float32,), (OPERATOR,))
    assert chosen(window_case(dtype=torch.float32)) == "triton" and children.count == 1 and made.calls == 0


@pytest.mark.parametrize("allow", SETTINGS)
def test_what_is_proven_without_it_is_not_with_it(allow: Callable, a_gpu, fake) -> None:  # noqa: F811
    """Nor the other way round; an answer of each lasts."""
    place, device = (OPERATOR, "triton", "float32", "cuda:0"), torch.device("cuda", 0)

    def said() -> str | None:
        return _proof._said(*place[:2], torch.float32, device)

    _proof.remember(place, _proof.Verdict(True, "right"))
    assert said() is None
    allow("tf32")
    assert said() == _proof.NOT_YET
    with pytest.warns(UserWarning, match="wrong results in float32 on cuda:0"):
        _proof.remember(place, _proof.Verdict(False, "largest error 3"))
    assert "largest error 3" in said()
    allow("ieee")
    assert said() is None
    _proof.remember((OPERATOR, "triton", "bfloat16", "cuda:0"), _proof.Verdict(True, "right"))
    allow("tf32")
    assert _proof._said(*place[:2], torch.bfloat16, device) is None  # products of bfloat16 are the same
