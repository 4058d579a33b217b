"""The Linear of inference: against float64, and when it is PyTorch's own."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.ops import _linear, _packed
from magnet_fast.ops._linear import linear, pack_linear, unpack_linear
from tests.onednn import needs_onednn

DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not _linear._works(torch.bfloat16), reason="oneDNN has no bfloat16 on this machine"),
    ),
]
ROWS, INNER, OUTER = 301, 96, 80


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return values(7, 43, INNER), values(OUTER, INNER, seed=1), values(OUTER, seed=2), values(7, 43, OUTER, seed=3)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    out = F.linear(x, weight, bias)
    out = getattr(F, activation)(out) if activation else out
    return out if residual is None else residual + out


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether oneDNN was taken, call by call."""
    found = []
    decide = _linear._takes_onednn
    monkeypatch.setattr(_linear, "_takes_onednn", lambda *tensors: found.append(decide(*tensors)) or found[-1])
    return found


@needs_onednn
@pytest.mark.parametrize("form", ["plain", "residual"])
def test_a_slice_of_a_weight_is_brought_together_first(form: str, monkeypatch) -> None:
    """With the slice itself oneDNN takes a thousand times as long."""
    x, weight, bias, residual = arguments()
    wider = torch.cat([values(OUTER, 5), weight], dim=1)
    given = []
    onednn = torch.ops.mkldnn._linear_pointwise

    class Watched:
        def __call__(self, x, weight, *rest):
            given.append(weight.is_contiguous())
            return onednn(x, weight, *rest)

        def binary(self, x, other, weight, *rest):
            given.append(weight.is_contiguous())
            return onednn.binary(x, other, weight, *rest)

    assert _linear._works(torch.float32)  # tried out before it is watched
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Watched(), raising=False)
    more = {"residual": residual} if form == "residual" else {}
    with torch.no_grad():
        found = linear(x, wider[:, 5:], bias, **more)
    torch.testing.assert_close(found, plain(x, weight, bias, None, more.get("residual")))
    assert given == [True]


@needs_onednn
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("form", ["plain", "gelu", "relu", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, form: str, strided: bool, with_bias: bool, taken: list[bool]) -> None:
    x, weight, bias, residual = arguments()
    if strided:
        x = values(43, 7, 2 * INNER).transpose(0, 1)[..., :INNER]
        weight = values(INNER, OUTER, seed=1).T
        residual = values(7, OUTER, 43, seed=3).transpose(1, 2)
    x, weight, bias, residual = (tensor.to(dtype) for tensor in (x, weight, bias, residual))
    bias = bias if with_bias else None
    residual = residual if form == "residual" else None
    activation = form if form in ("gelu", "relu") else None
    double = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, residual)]
    truth = plain(*double[:3], activation, double[3])
    expected = plain(x, weight, bias, activation, residual)
    with torch.no_grad():
        found = linear(x, weight, bias, activation=activation, residual=residual)
    assert taken == [True] and found.shape == (7, 43, OUTER) and found.dtype == dtype
    error, baseline = (found - truth).abs().max(), (expected - truth).abs().max()
    assert error <= 4 * baseline + 1e-6 * truth.abs().max()


@needs_onednn
def test_gelu_far_out_and_not_a_number(taken: list[bool]) -> None:
    """The exact GELU, not one of its approximations: they are 5e-4 away around 2."""
    x = torch.linspace(-12, 12, ROWS * INNER).view(ROWS, INNER)
    x[5, 3] = torch.nan
    with torch.no_grad():
        found = linear(x, torch.eye(INNER), activation="gelu")
    assert taken == [True] and found[5].isnan().all()
    keep = torch.arange(ROWS) != 5
    torch.testing.assert_close(found[keep], F.gelu(x[keep].double()).float(), rtol=1e-6, atol=1e-6)


@needs_onednn
def test_changed_weights_are_seen(taken: list[bool]) -> None:
    x, weight, bias, _ = arguments()
    weight = nn.Parameter(weight)
    with torch.no_grad():
        before = linear(x, weight, bias)
        weight.data.mul_(2)
        bias.zero_()
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight))
    assert taken == [True, True] and not torch.equal(before, F.linear(x, weight))


class Kept(Tensor):
    """A subclass, which may compute anything."""


@pytest.mark.parametrize(
    "case",
    ["gradients", "float16", "subclass", "sparse", "autocast", "reference", "switched off", "small", "operators gone"],
)
def test_runs_as_pytorch_does(case: str, taken: list[bool], monkeypatch) -> None:
    x, weight, bias, residual = arguments()
    contexts = {
        "gradients": torch.enable_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "reference": ops.backend("reference"),
        "switched off": torch.backends.mkldnn.flags(enabled=False),
    }
    if case == "float16":
        x, weight, bias, residual = (tensor.half() for tensor in (x, weight, bias, residual))
    elif case == "subclass":
        weight = weight.as_subclass(Kept)
    elif case == "sparse":
        weight = weight.to_sparse_csr()
    elif case == "small":
        x, residual = x[:1, :9], residual[:1, :9]
    elif case == "operators gone":
        monkeypatch.setattr(_linear, "_works", lambda dtype: False)
    weight.requires_grad_(case == "gradients")
    with torch.no_grad(), contexts.get(case, torch.no_grad()):
        found = linear(x, weight, bias, residual=residual)
        expected = residual + F.linear(x, weight, bias)
    assert taken == [False] and torch.equal(found, expected)
    assert found.requires_grad == (case == "gradients")


@needs_onednn
def test_backend_of_linears_alone(taken: list[bool]) -> None:
    x, weight, bias, _ = arguments()
    with torch.no_grad():
        with ops.backend("reference", "linear"):
            assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        with ops.backend("reference", "window_attention"):
            linear(x, weight, bias)
        with ops.backend("reference"), ops.backend("cpu", "linear"):
            linear(x, weight, bias)
    assert taken == [False, True, True]


@needs_onednn
@pytest.mark.parametrize("name", ["auto", "reference", "cpu", "triton", "cuda"])
def test_explain(name: str, taken: list[bool]) -> None:
    x, weight, bias, residual = arguments()
    with torch.no_grad(), ops.backend(name, "linear"):
        found = ops.explain("linear", x, weight, bias, residual=residual)
        linear(x, weight, bias, residual=residual)
        small = ops.explain("linear", x[:1, :1], weight)
    assert found.requested == name and found.chosen == ("cpu" if taken == [True] else "reference")
    assert found.chosen == ("cpu" if name in ("auto", "cpu") else "reference")
    assert small.chosen == "reference" and "small" in small.reasons["cpu"]
    assert set(found.reasons) == {"cuda", "triton", "cpu", "reference"} - {found.chosen}
    assert (
        str(found).splitlines()[0]
        == "linear: "
        + {
            "auto": "cpu would run (the fastest that can)",
            "cpu": "cpu would run (forced)",
            "reference": "reference would run (forced)",
            "triton": "reference would run (backend 'triton' is forced and cannot)",
            "cuda": "reference would run (backend 'cuda' is forced and cannot)",
        }[name]
    )
    assert ops.available_backends("linear") == ("cpu", "reference")


def test_explain_says_why_not() -> None:
    x, weight, bias, residual = arguments()
    assert "gradients" in ops.explain("linear", x, weight).reasons["cpu"]
    with torch.no_grad():
        assert "float16" in ops.explain("linear", x.half(), weight.half()).reasons["cpu"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast" in ops.explain("linear", x, weight).reasons["cpu"]
        with torch.backends.mkldnn.flags(enabled=False):
            assert "switched off" in ops.explain("linear", x, weight).reasons["cpu"]
    with pytest.raises(ValueError, match="activation: expected None"):
        ops.explain("linear", x, weight, bias, activation="relu", residual=residual)


@pytest.mark.parametrize("change", ["gone", "other arguments", "other arithmetic"])
def test_operators_of_another_version_are_not_used(change: str, monkeypatch) -> None:
    def takes_less(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def without_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Tensor:
        return F.linear(x, weight, bias)

    without_gelu.binary = lambda x, other, weight, bias, what: other + F.linear(x, weight, bias)
    there = {"gone": {}, "other arguments": {"_linear_pointwise": takes_less}}
    there = there.get(change, {"_linear_pointwise": without_gelu})
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**there))
    assert not _linear._works.__wrapped__(torch.float32)


def test_activation_and_a_residual() -> None:
    x, weight, bias, residual = arguments()
    with pytest.raises(ValueError, match="activation: expected None where there is a residual, got 'gelu'"):
        linear(x, weight, bias, activation="gelu", residual=residual)


# ---- Packed weights ---------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("form", ["plain", "gelu", "relu", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_against_float64(dtype: torch.dtype, form: str, packings: list[Tensor]) -> None:
    x, weight, bias, residual = (tensor.to(dtype) for tensor in arguments())
    residual = residual if form == "residual" else None
    activation = form if form in ("gelu", "relu") else None
    double = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, residual)]
    truth = plain(*double[:3], activation, double[3])
    expected = plain(x, weight, bias, activation, residual)
    layer = nn.Linear(*weight.shape[::-1], dtype=dtype)
    layer.weight = weight = nn.Parameter(weight)
    pack_linear(layer)
    with torch.no_grad():
        found = linear(x, weight, bias, activation=activation, residual=residual)
        fewer = linear(x[:3], weight, bias)  # the layout of the first call serves any number of rows
    assert len(packings) == 1
    error, baseline = (found - truth).abs().max(), (expected - truth).abs().max()
    assert error <= 4 * baseline + 1e-6 * truth.abs().max()
    torch.testing.assert_close(fewer, F.linear(x[:3], weight, bias))


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "loaded": lambda layer: layer.load_state_dict({"weight": values(OUTER, INNER, seed=5), "bias": layer.bias}),
    "other memory": lambda layer: setattr(layer.weight, "data", values(OUTER, INNER, seed=6)),
    "there and back": lambda layer: layer.bfloat16().float(),
    "optimiser": lambda layer: step(layer),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(values(OUTER, INNER, seed=7))),
}


def step(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


@needs_onednn
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_that_change_are_packed_again(
    change: str, packed_layer: nn.Linear, packings: list[Tensor]
) -> None:
    x = arguments()[0]
    with torch.no_grad():
        before = packed_layer(x)
        assert torch.equal(packed_layer(x), before) and len(packings) == 1
        CHANGES[change](packed_layer)
        after = packed_layer(x)
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, F.linear(x, packed_layer.weight, packed_layer.bias))
    assert len(packings) == (1 if change == "another parameter" else 2)  # which is not packed


@needs_onednn
def test_packed_memory_that_comes_back_is_not_taken_for_the_old(packed_layer: nn.Linear, packings: list) -> None:
    """Weights freed and allocated again at the same address, as many times as an allocator may do that."""
    x = arguments()[0]
    with torch.no_grad():
        for seed in range(20):
            packed_layer.weight.data = torch.empty(0)
            packed_layer.weight.data = values(OUTER, INNER, seed=seed)
            torch.testing.assert_close(packed_layer(x), F.linear(x, packed_layer.weight, packed_layer.bias))
    assert len(packings) == 20


@needs_onednn
def test_packed_layers_unpacked_copied_and_made_in_inference_mode(
    packed_layer: nn.Linear, packings: list[Tensor]
) -> None:
    x = arguments()[0]
    with torch.inference_mode():
        made_here = nn.Linear(INNER, OUTER)
        pack_linear(made_here)  # counts no changes: read as it lies
        made_here(x)
        copied = copy.deepcopy(packed_layer)
        copied(x)
        assert packings == []
        packed_layer(x)
        assert len(packings) == 1
    unpack_linear(packed_layer)
    with torch.no_grad():
        torch.testing.assert_close(packed_layer(x), F.linear(x, packed_layer.weight, packed_layer.bias))
    assert type(packed_layer) is nn.Linear and len(packings) == 1 and packed_layer not in _packed._copies


def test_packed_copies_live_no_longer_than_their_layer() -> None:
    gc.collect()  # of other tests
    count = len(_packed._copies)
    layer = nn.Linear(INNER, OUTER)
    pack_linear(layer)
    assert len(_packed._copies) == count + 1
    del layer
    gc.collect()
    assert len(_packed._copies) == count


@pytest.mark.parametrize("case", ["gradients", "small", "reference"])
def test_packed_layer_otherwise_computes_as_a_linear(
    case: str, packed_layer: nn.Linear, packings: list[Tensor]
) -> None:
    x = arguments()[0][:1, :9] if case == "small" else arguments()[0]
    with torch.set_grad_enabled(case == "gradients"), ops.backend("reference" if case == "reference" else "auto"):
        found = packed_layer(x)
        assert torch.equal(found, F.linear(x, packed_layer.weight, packed_layer.bias))
    assert found.requires_grad == (case == "gradients") and packings == []
