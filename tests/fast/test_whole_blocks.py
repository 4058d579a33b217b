"""A Swin block taken whole, in inference: its answer, its slices, and the calls in which it runs part by part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import magnet_fast
from magnet_fast.fast import _block
from magnet_fast.ops import _linear

from . import zoo

FAMILIES = {
    "timm": "mlp.act",
    "Swin": "mlp.activation_fn",
    "SAM": "mlp.act",
    "timm SAM": "mlp.act",
}  # and where a block has its GELU


FUSED = ("FusedSwinTransformerBlock", "FusedSwinLayer", "FusedSamVisionLayer", "FusedVisionTransformerSAMBlock")


@pytest.fixture(autouse=True)
def rows(monkeypatch) -> list[int]:
    """Images of every call that takes a block whole, on oneDNN however small it is."""
    called = []
    forward = _block.forward
    monkeypatch.setattr(_block, "forward", lambda x, *rest: called.append(len(x)) or forward(x, *rest))
    monkeypatch.setattr(_linear, "_FEWEST_MULTIPLICATIONS", 0)
    return called


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in FUSED]


def accelerated(name: str, size: tuple[int, int] = zoo.EVEN) -> nn.Module:
    model = zoo.FAMILIES[name].model(size).eval()
    magnet_fast.accelerate(model)
    return model


@pytest.mark.parametrize("slice_bytes", [1, 40_000, 1 << 30])
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_slices(name: str, dtype: torch.dtype, odd: bool, slice_bytes: int, rows: list[int], monkeypatch) -> None:
    """A token at a time, an image or two at a time, everything at once; against float64."""
    monkeypatch.setattr(_block, "_SLICE_BYTES", slice_bytes)
    size = zoo.FAMILIES[name].odd if odd else zoo.EVEN
    inputs = zoo.image(size, batch=3)
    inputs = inputs if name.startswith("timm") else {"pixel_values": inputs}
    with torch.no_grad():
        truth = zoo.call(zoo.FAMILIES[name].model(size).eval().double(), inputs)
        plain = zoo.call(zoo.FAMILIES[name].model(size).eval().to(dtype), inputs)
        model = accelerated(name, size).to(dtype)
        found = zoo.call(model, inputs)
    assert rows == [3] * len(blocks(model)) and rows
    for expected, original, ours in zip(truth, plain, found, strict=True):
        error, baseline = (ours - expected).abs().max(), (original - expected).abs().max()
        assert error <= 4 * baseline + (1e-5 if dtype == torch.float32 else 2**-8) * expected.abs().max()


@pytest.mark.parametrize("count, values, sizes", [(7, 4, [4, 3]), (7, 100, [1] * 7), (8, 5, [3, 3, 2]), (0, 4, [0])])
def test_slices_are_even(count: int, values: int, sizes: list[int], monkeypatch) -> None:
    monkeypatch.setattr(_block, "_SLICE_BYTES", 64)
    found = []
    x = torch.arange(2.0 * count).view(count, 2)
    out = _block._sliced(lambda part: found.append(len(part)) or part + 1, x, values)
    assert found == sizes and torch.equal(out, x + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_weights_are_seen(name: str) -> None:
    model, inputs = accelerated(name), zoo.FAMILIES[name].inputs(zoo.EVEN)
    with torch.no_grad():
        before = zoo.call(model, inputs)
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
        after = zoo.call(model, inputs)
        magnet_fast.restore(model)
        expected = zoo.call(model, inputs)
    for ours, theirs, old in zip(after, expected, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, old, rtol=1e-3, atol=1e-3)


class Adapter(nn.Linear):
    """A Linear that computes more than its weight says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def change(model: nn.Module, name: str, case: str) -> None:
    for block in blocks(model):
        if case == "tanh":
            block.set_submodule(FAMILIES[name], nn.GELU(approximate="tanh").eval())
        elif case == "relu":
            block.set_submodule(FAMILIES[name], nn.ReLU().eval())
        elif case == "adapter":
            block.mlp.get_submodule("lin1" if name == "SAM" else "fc1").__class__ = Adapter
        elif case == "one more part":
            block.mlp.scale = nn.Identity().eval()
        elif case == "dropout":
            next((module for module in block.modules() if isinstance(module, nn.Dropout)), block.mlp).train()


@pytest.mark.parametrize("case", ["gradients", "autocast", "tanh", "relu", "adapter", "one more part", "dropout"])
@pytest.mark.parametrize("name", FAMILIES)
def test_runs_part_by_part(name: str, case: str, rows: list[int]) -> None:
    inputs = zoo.FAMILIES[name].inputs(zoo.EVEN)
    model = accelerated(name)
    change(model, name, case)
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found = zoo.call(model, inputs)
        assert rows == []
        magnet_fast.restore(model)
        expected = zoo.call(model, inputs)
    tolerance = 0.05 if case == "autocast" else 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_within_a_block_are_called_once(name: str, rows: list[int], monkeypatch) -> None:
    monkeypatch.setattr(_block, "_SLICE_BYTES", 1)
    model, called = accelerated(name), []
    norm = {"Swin": "layernorm_before", "SAM": "layer_norm1"}.get(name, "norm1")
    expand = "mlp.lin1" if name == "SAM" else "mlp.fc1"
    hooked = blocks(model)[0]
    for part, module in hooked.named_modules():
        if part in (norm, "mlp", expand):
            module.register_forward_hook(lambda module, args, out, part=part: called.append(part))
    with torch.no_grad():
        zoo.call(model, zoo.FAMILIES[name].inputs(zoo.EVEN))
    assert sorted(called) == sorted([norm, "mlp", expand])
    assert len(rows) == len(blocks(model)) - 1
