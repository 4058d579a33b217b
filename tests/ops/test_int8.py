"""Linears in int8: within what their rounding allows, of any sizes, and only where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from magnet_fast import accelerate, restore
from magnet_fast.fast import accelerated
from magnet_fast.inference import Segmenter
from magnet_fast.ops import _cpu_backend, _int8, _linear, _linear_chain, _packed
from magnet_fast.ops._linear import linear, pack_linear
from magnet_fast.ops._linear_chain import Step
from magnet_fast.ops._view import view
from tests.onednn import needs_onednn

_cpu = _cpu_backend.extension
needs_int8 = pytest.mark.skipif(not _int8.works(), reason="no compiled extension, or no int8 product in PyTorch here")
FORMS = ["plain", "gelu", "relu", "residual"]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products are otherwise not brought to oneDNN."""
    monkeypatch.setattr(_linear, "_FEWEST_MULTIPLICATIONS", 0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs' shape of every product in int8."""
    found, product = [], _int8._product
    monkeypatch.setattr(_int8, "_product", lambda x, weight: found.append(x.shape) or product(x, weight))
    return found


@pytest.fixture
def level() -> Iterator[None]:
    before = _cpu.simd_level()
    yield
    _cpu.set_simd_level(before)


def layer_of(inputs: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    pack_linear(layer, int8=True)
    return layer


def ordinary(x: Tensor, layer: nn.Linear, form: str, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = F.linear(x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    if residual is not None:
        return y + residual.to(dtype)
    return y if form == "plain" else getattr(F, form)(y)


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """What half a unit of every input and every weight can add up to, in float64."""
    x, weight = x.double().abs(), weight.double()
    unit_x = (x.amax(1) * 2) / _int8._greatest() / 2  # at most, whatever the least value is
    unit_w = weight.abs().amax(1) / 127 / 2
    by_inputs = unit_x[:, None] * weight.abs().sum(1)
    by_weights = x.sum(1)[:, None] * unit_w
    return by_inputs + by_weights + unit_x[:, None] * unit_w * x.shape[1]


@needs_int8
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_within_what_rounding_allows(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    inputs, outputs = (16 * data.draw(st.integers(1, 9)) for _ in range(2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    form, bias = data.draw(st.sampled_from(FORMS)), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = layer_of(inputs, outputs, dtype, bias)
    x = (torch.randn(rows, inputs) * 10 ** data.draw(st.integers(-3, 3)) + data.draw(st.integers(-2, 2))).to(dtype)
    if data.draw(st.booleans()):
        x = x.repeat(1, 2)[:, :inputs]  # rows that do not lie side by side
    residual = torch.randn(rows, outputs).to(dtype) if form == "residual" else None
    with torch.no_grad():
        found = linear(
            x, layer.weight, layer.bias, activation=form if form in ("gelu", "relu") else None, residual=residual
        )
        truth = ordinary(x, layer, form, residual, torch.float64)
    # GELU is steeper than 1 somewhere, by a seventh; results are rounded to their dtype.
    allowed = 1.13 * bound(x, layer.weight) + 4 * torch.finfo(dtype).eps * (truth.abs() + bound(x, layer.weight))
    assert found.dtype == dtype and found.shape == truth.shape
    assert ((found.double() - truth).abs() <= allowed + 1e-6 * truth.abs().max()).all()


@needs_int8
def test_close_where_it_counts(products: list[torch.Size]) -> None:
    """The bound above is for the worst; ordinary numbers come out within 2 % of a layer's size."""
    torch.manual_seed(0)
    layer, x = layer_of(256, 96), torch.randn(4, 50, 256)
    with torch.no_grad():
        found = layer(x)
    truth = ordinary(x, layer, "plain", None, torch.float64)
    assert found.shape == (4, 50, 96) and products == [(200, 256)]
    assert (found - truth).norm() < 0.02 * truth.norm()


@needs_int8
def test_bytes_by_every_level(level: None) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5, 48) * 3, torch.full((1, 48), 7.5), torch.zeros(1, 48), -torch.rand(2, 48)])
    least, greatest = x.double().amin(1), x.double().amax(1)
    for name in _cpu.supported_simd_levels():
        if name == "amx":  # products of bfloat16 alone are its own
            continue
        _cpu.set_simd_level(name)
        for most in (127, 255):
            numbers, (scale, minimum) = torch.empty(9, 48, dtype=torch.uint8), torch.empty(2, 9)
            _cpu.rows_to_bytes(
                x=view(x), bytes=view(numbers), scale=view(scale), minimum=view(minimum), most=most, threads=2
            )
            assert torch.equal(minimum.double(), least), name
            torch.testing.assert_close(scale.double(), (greatest - least) / most, atol=0, rtol=1e-6)
            read = minimum[:, None].double() + scale[:, None].double() * numbers.double()
            assert ((read - x.double()).abs() <= 0.5001 * scale[:, None].double() + 1e-6).all(), name
            assert numbers.max() == most and (numbers[5:7] == 0).all()


@needs_int8
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_is_nan_alone(bad: float, dtype: torch.dtype) -> None:
    layer, x = layer_of(32, 16, dtype), torch.randn(7, 32, dtype=dtype)
    x[3, 5] = bad
    with torch.no_grad():
        found = linear(x, layer.weight, layer.bias, activation="relu")
    assert found[3].isnan().all() and found[[0, 1, 2, 4, 5, 6]].isfinite().all()


@needs_int8
def test_weights_of_zeros_and_no_rows() -> None:
    layer = layer_of(32, 16)
    layer.weight[3] = 0
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[:, 3], layer.bias[3].expand(5))
        assert layer(x[:0]).shape == (0, 16)


@needs_int8
def test_the_same_bits_on_any_number_of_threads() -> None:
    layer, x, residual = layer_of(256, 256), torch.randn(700, 256), torch.randn(700, 256)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(linear(x, layer.weight, layer.bias, residual=residual))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_int8
@pytest.mark.parametrize("change", ["in place", "loaded", "not finite", "other sizes"])
def test_weights_that_change(change: str, products: list[torch.Size]) -> None:
    layer, x = layer_of(64, 32), torch.randn(20, 64)
    with torch.no_grad():
        layer(x)
        assert len(products) == 1
        if change == "in place":
            layer.weight.mul_(-3)
        elif change == "loaded":
            layer.load_state_dict(nn.Linear(64, 32).state_dict())
        elif change == "not finite":
            layer.weight[1, 2] = torch.nan
        else:
            layer.weight = nn.Parameter(torch.randn(30, 64), requires_grad=False)
            layer.bias = None
        found, truth = layer(x), F.linear(x, layer.weight, layer.bias)
    assert len(products) == (2 if change in ("in place", "loaded") else 1)
    torch.testing.assert_close(found, truth, atol=0.1, rtol=0.05, equal_nan=True)


@needs_int8
def test_only_where_it_was_asked_for(products: list[torch.Size]) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 7))
    x = torch.randn(9, 64)
    report = accelerate(model, pack=True, weights="int8")
    assert [one.remark for one in report.modules if one.operator == "linear"] == [
        "packed weight in int8 in inference on a CPU",
        "packed weight in int8 in inference on a CPU",
        "packed weight in inference on a CPU, not in int8: sizes are no multiples of 16",
    ]
    accelerate(model)  # says nothing of the copies: they stay what they were
    with torch.no_grad():
        close = model(x)
    assert len(products) == 2
    y = model(x)  # gradients are recorded: the layers themselves
    y.sum().backward()
    assert len(products) == 2 and model[0].weight.grad is not None
    torch.testing.assert_close(close, y.detach(), atol=0.05, rtol=0.05)
    accelerate(model, pack=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y.detach())
    assert len(products) == 2
    restore(model)
    assert type(model[0]) is nn.Linear and not _packed.is_int8(model[0])
    with accelerated(model, pack=True, weights="int8"), torch.no_grad():
        model(x)
    assert len(products) == 4 and type(model[0]) is nn.Linear


@needs_int8
def test_chains_are_of_the_weights_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_chain, "_worthwhile", lambda dtype: True)
    layer, x = layer_of(64, 64), torch.randn(30, 64)
    with torch.no_grad():
        assert not _linear_chain.runs(x, [Step(layer)])
        pack_linear(layer)
        assert _linear_chain.runs(x, [Step(layer)])


@needs_int8
def test_a_segmenter_in_int8_draws_the_same_masks(products: list[torch.Size]) -> None:
    image, expressions = "docs/example.jpg", ["the square below the little cyan thing", "the little cyan thing"]
    exact, coarse = Segmenter.from_checkpoint(), Segmenter.from_checkpoint(dtype="int8")
    pairs = list(zip(exact(image, expressions), coarse(image, expressions), strict=True))
    assert len(products) > 20
    for true, found in pairs:
        assert (true.mask & found.mask).sum() >= 0.95 * (true.mask | found.mask).sum() > 0
        assert abs(true.probability - found.probability).max() > 0  # it did something


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"weights: expected 'same' or 'int8', got 'int4'"):
        accelerate(model, pack=True, weights="int4")
    with pytest.raises(ValueError, match=r"weights: int8 is of packed copies; expected pack=True"):
        accelerate(model, weights="int8")
    with pytest.raises(ValueError, match=r"fast: expected True with dtype int8"):
        Segmenter.from_checkpoint(dtype="int8", fast=False)
    monkeypatch.setattr(_int8, "works", lambda: False)
    with pytest.raises(ValueError, match=r"weights: int8 needs the compiled extension and the int8 product"):
        accelerate(model, pack=True, weights="int8")
    assert type(model) is nn.Linear


@needs_onednn
def test_extension_refuses_what_does_not_fit() -> None:
    x, numbers, (scale, minimum) = torch.randn(3, 24), torch.empty(3, 24, dtype=torch.uint8), torch.empty(2, 3)
    given = {"x": view(x), "bytes": view(numbers), "scale": view(scale), "minimum": view(minimum), "threads": 1}
    with pytest.raises(ValueError, match=r"width: expected a multiple of 16, got 24"):
        _cpu.rows_to_bytes(**given, most=127)
    x, numbers = x[:, :16].contiguous(), numbers[:, :16].contiguous()
    given |= {"x": view(x), "bytes": view(numbers)}
    with pytest.raises(ValueError, match=r"most: expected 1 \.\. 255, got 256"):
        _cpu.rows_to_bytes(**given, most=256)
    with pytest.raises(ValueError, match=r"bytes: expected size 3 in dimension 0"):
        _cpu.rows_to_bytes(**given | {"bytes": view(numbers[:2])}, most=127)
    with pytest.raises(ValueError, match=r"x: expected dtype 0 \(float32\) or 1 \(bfloat16\)"):
        _cpu.rows_to_bytes(**given | {"x": view(x.double())}, most=127)
    y, totals = torch.empty(3, 16), torch.empty(16)
    rows = {"sums": view(y), "scale": view(scale), "minimum": view(minimum), "totals": view(totals), "threads": 1}
    with pytest.raises(ValueError, match=r"activation: expected 0 where there is a residual, got 1"):
        _cpu.sums_to_rows(**rows, bias=None, activation=1, residual=view(y), y=view(y))
    with pytest.raises(ValueError, match=r"bias: expected size 16 in dimension 0"):
        _cpu.sums_to_rows(**rows, bias=view(totals[:8]), activation=0, residual=None, y=view(y))
