"""Packed weights under autocast to bfloat16: what is computed, from which copy, and when it is PyTorch's."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from threading import Event, Thread, current_thread
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

import magnet_fast
from magnet_fast import ops
from magnet_fast.ops import _convolution, _int8, _linear, _packed, _training_products
from magnet_fast.ops._linear import linear

INNER, OUTER = 96, 80
needs_bfloat16 = pytest.mark.skipif(
    not (_linear._works(torch.bfloat16) and _convolution._works(torch.bfloat16)),
    reason="oneDNN has no bfloat16 on this machine",
)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Kept(Tensor):
    """A subclass, which may compute anything."""


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@needs_bfloat16
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["none", "gelu", "relu", "residual"])
def test_autocast_reads_a_copy_in_bfloat16(form: str, given: torch.dtype, packed_layer: nn.Linear) -> None:
    x, residual = values(7, 43, INNER), values(7, 43, OUTER, seed=3)
    x, residual = x.to(given), residual.to(given)
    weight, bias = packed_layer.weight, packed_layer.bias
    after = {"activation": form} if form in ("gelu", "relu") else {"residual": residual if form == "residual" else None}

    def plainly(dtype: torch.dtype) -> Tensor:
        return _linear.then(
            F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)),
            after.get("activation"),
            None if after.get("residual") is None else residual.to(dtype),
        )

    with torch.no_grad():
        truth = plainly(torch.float64)
        with autocast():
            plain = _linear.then(F.linear(x, weight, bias), after.get("activation"), after.get("residual"))
            found = linear(x, weight, bias, **after)
            explained = ops.explain("linear", x, weight, bias)
    assert (
        found.dtype
        == plain.dtype
        == (torch.float32 if form == "residual" and given is torch.float32 else torch.bfloat16)
    )
    error, baseline = (found - truth).abs().max(), (plain - truth).abs().max()
    assert error <= 1.5 * baseline
    assert list(_packed._copies[packed_layer]) == ["onednn, torch.bfloat16"] and explained.chosen == "cpu"


@needs_bfloat16
def test_autocast_and_float32_in_turns_have_a_copy_each(packed_layer: nn.Linear, packings: list[Tensor]) -> None:
    x = values(7, 43, INNER)
    with torch.no_grad():
        for _ in range(2):
            wide = packed_layer(x)
            with autocast():
                low = packed_layer(x)
            assert (wide.dtype, low.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(low.float(), wide, rtol=2e-2, atol=2e-2)
        assert [weight.dtype for weight in packings] == [torch.float32, torch.bfloat16]
        packed_layer.weight.mul_(2)
        with autocast():
            changed = packed_layer(x).float()
    torch.testing.assert_close(
        changed, F.linear(x, packed_layer.weight, packed_layer.bias).detach(), rtol=2e-2, atol=4e-2
    )
    assert len(packings) == 3


@needs_bfloat16
@pytest.mark.parametrize("case", ["float16", "gradients", "reference", "switched off", "subclass", "float64"])
def test_autocast_otherwise_is_pytorch_s(case: str, packed_layer: nn.Linear, packings: list[Tensor]) -> None:
    x = values(7, 43, INNER)
    contexts = {"reference": ops.backend("reference"), "switched off": torch.backends.mkldnn.flags(enabled=False)}
    if case == "subclass":
        x = x.as_subclass(Kept)
    if case == "float64":
        x, packed_layer = x.double(), packed_layer.double()
    cast = torch.autocast("cpu", torch.float16 if case == "float16" else torch.bfloat16)
    with torch.set_grad_enabled(case == "gradients"), contexts.get(case, nullcontext()), cast:
        found, expected = packed_layer(x), F.linear(x, packed_layer.weight, packed_layer.bias)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and packings == []


def test_what_a_caller_is_in_the_middle_of_does_not_decide_what_works() -> None:
    """The answer is kept for the process: it must not be one of autocast's, or of a default dtype."""
    assert torch.get_default_dtype() == torch.float32
    dtypes = (torch.float32, torch.bfloat16)
    checks = [partial(module._works.__wrapped__, dtype) for module in (_linear, _convolution) for dtype in dtypes]
    checks += [_int8.works.__wrapped__, partial(_convolution._normalises, DetrFrozenBatchNorm2d)]
    expected = [check() for check in checks]
    with autocast(), torch.no_grad():
        assert [check() for check in checks] == expected
    try:
        torch.set_default_dtype(torch.float64)
        assert [check() for check in checks] == expected
        with torch.device("meta"):
            assert [check() for check in checks] == expected
        assert set(_training_products._times()) == {"forward", "input_gradient", "weight_gradient"}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("module", [_linear, _convolution])
def test_of_two_threads_that_ask_what_works_each_keeps_its_autocast(module: ModuleType, monkeypatch) -> None:
    asked, other_has_left, found = Event(), Event(), []
    available = torch.backends.mkldnn.is_available

    def slowly() -> bool:
        if current_thread() is thread:
            asked.set()
            other_has_left.wait(60)
        return available()

    def ask() -> None:
        with autocast():
            module._works.__wrapped__(torch.float32)
            found.append(torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", slowly)
    thread = Thread(target=ask)
    thread.start()
    assert asked.wait(60)
    module._works.__wrapped__(torch.float32)
    other_has_left.set()
    thread.join()
    assert found == [True] and not torch.is_autocast_enabled("cpu")


# ---- Convolutions ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """As ResNet's, or with another norm or dtype of its residual."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1, bias=False), norm(24), nn.ReLU(), nn.Conv2d(24, 16, 1, bias=False), norm(16)
        )
        for module in self.layers.modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(_convolution.run_layers(list(self.layers), x, x))


@pytest.fixture
def convolutions(monkeypatch) -> list[torch.dtype]:
    """The dtype of each folded convolution's input, as it is called."""
    found: list[torch.dtype] = []
    convolve = _convolution._convolve
    monkeypatch.setattr(_convolution, "_convolve", lambda x, *rest: found.append(x.dtype) or convolve(x, *rest))
    monkeypatch.setattr(_convolution, "_FEWEST_MULTIPLICATIONS", 0)
    return found


@needs_bfloat16
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_convolutions_are_folded_in_bfloat16(given: torch.dtype, convolutions: list[torch.dtype]) -> None:
    block, x = Block().eval().requires_grad_(False), values(2, 16, 9, 7).to(given)
    truth = copy.deepcopy(block).double()(x.double())
    with torch.no_grad(), autocast():
        plain = block(x)
        _convolution.pack_convolutions(list(block.layers))
        found, again = block(x), block(x)
    assert convolutions == [torch.bfloat16] * 4
    assert found.dtype == plain.dtype == given and torch.equal(found, again)  # a residual of float32 stays one
    assert (found - truth).abs().max() <= 1.5 * (plain - truth).abs().max()
    with torch.no_grad():
        torch.testing.assert_close(block(x.float()), truth.float(), rtol=1e-4, atol=1e-4)
        block.layers[1].weight.mul_(3)
        with autocast():
            changed = block(x)
    torch.testing.assert_close(changed.double(), copy.deepcopy(block).double()(x.double()), rtol=5e-2, atol=5e-2)


@needs_bfloat16
@pytest.mark.parametrize("case", ["frozen norm", "float16", "reference"])
def test_convolutions_that_stay_modules(case: str, convolutions: list[torch.dtype]) -> None:
    block = Block(DetrFrozenBatchNorm2d if case == "frozen norm" else nn.BatchNorm2d).eval().requires_grad_(False)
    x = values(2, 16, 9, 7)
    _convolution.pack_convolutions(list(block.layers))
    plain = copy.deepcopy(block)  # a copy keeps no folded weights
    cast = torch.autocast("cpu", torch.float16 if case == "float16" else torch.bfloat16)
    with torch.no_grad(), ops.backend("reference" if case == "reference" else "auto"), cast:
        found, expected = block(x), plain(x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert convolutions == []


@needs_bfloat16
def test_a_hook_on_a_convolution_sees_what_it_sees_without(convolutions: list[torch.dtype]) -> None:
    """Autocast casts within the convolution: its input is the block's."""
    block, seen = Block().eval().requires_grad_(False), []
    block.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    _convolution.pack_convolutions(list(block.layers))
    with torch.no_grad(), autocast():
        block(values(2, 16, 9, 7))
    assert seen == [torch.float32] and convolutions == [torch.bfloat16]  # the other convolution


@needs_bfloat16
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_whole_model(weights: str | None) -> None:
    """A model that the user accelerates once computes under autocast what it does without, to rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(2), nn.Linear(256, 512), nn.GELU(),
        nn.Linear(512, 256),
    ).eval()  # fmt: skip
    x = values(4, 3, 64, 64)
    with torch.no_grad():
        with autocast():
            plain = model(x)
        expected = model(x)
        magnet_fast.accelerate(model, pack=True, **({"weights": weights} if weights else {}))
        with autocast():
            found = model(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    error, baseline = (found - expected).abs().max(), (plain - expected).abs().max()
    assert error <= (1.5 if weights is None else 6) * baseline
    assert any("int8" in kept if weights else "onednn, torch.bfloat16" in kept for kept in _packed._copies.values())
