"""Convolutions with the BatchNorm after each folded in: against float64, when weights change, when it steps aside."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

import magnet_fast
from magnet_fast import ops
from magnet_fast.models.encoders.clip_resnet import Bottleneck
from magnet_fast.models.heads.topdown import ConvBlock
from magnet_fast.ops import _convolution, _packed
from magnet_fast.ops._convolution import PackedSequential
from tests.onednn import needs_onednn

pytestmark = needs_onednn

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if _convolution._works(dtype)]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What followed the convolutions that took their BatchNorm with them, of any size."""
    found: list[str] = []
    convolve = _convolution._convolve

    def counted(x: Tensor, folded: Any, unary: tuple[str, ...], *residual: Any) -> Tensor:
        found.append("sum" if residual else unary[0])
        return convolve(x, folded, unary, *residual)

    monkeypatch.setattr(_convolution, "_convolve", counted)
    monkeypatch.setattr(_convolution, "_FEWEST_MULTIPLICATIONS", 0)
    return found


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    """Every parameter and statistic drawn, in evaluation."""
    for seed, (name, tensor) in enumerate(module.state_dict().items()):
        if name.endswith("running_var"):
            tensor.copy_(values(*tensor.shape, seed=seed).abs() + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(values(*tensor.shape, seed=seed) * (tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 1))
    return module.eval()


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "3x3": lambda: [nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)],
    "relu": lambda: [nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU()],
    "1x1 with bias": lambda: [nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.ReLU()],
    "stride, dilation": lambda: [nn.Conv2d(6, 10, (3, 2), stride=(2, 1), dilation=2), nn.BatchNorm2d(10)],
    "groups": lambda: [nn.Conv2d(6, 12, 3, groups=3, padding=(0, 2)), nn.BatchNorm2d(12), nn.ReLU()],
    "not affine": lambda: [nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10, eps=0.1, affine=False), nn.ReLU()],
    "silu": lambda: [nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.SiLU(inplace=True)],
    "relu6, depthwise": lambda: [nn.Conv2d(6, 12, 5, groups=6, bias=False), nn.BatchNorm2d(12), nn.ReLU6()],
    "hardswish, nothing between": lambda: [
        nn.Conv2d(6, 10, 3), nn.Identity(), nn.BatchNorm2d(10), nn.Identity(), nn.Hardswish(),
    ],
    "frozen norm": lambda: [nn.Conv2d(6, 10, 3, bias=False), FrozenBatchNorm2d(10, eps=0.1), nn.ReLU()],
    "transformers' frozen norm": lambda: [nn.Conv2d(6, 10, 3, bias=False), DetrFrozenBatchNorm2d(10)],
    "norm with its activation": lambda: [
        nn.Conv2d(6, 10, 3, bias=False), BatchNormAct2d(10, act_layer=nn.SiLU), nn.ReLU(),
        nn.Conv2d(10, 8, 1, bias=False), BatchNormAct2d(8, apply_act=False),
    ],
    "two, another layer between": lambda: [
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10),
    ],
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYERS)
def test_against_float64(case: str, dtype: torch.dtype, layout: torch.memory_format, calls: list[str]) -> None:
    layers = filled(nn.Sequential(*LAYERS[case]())).to(dtype, memory_format=layout)
    x = values(2, 6, 13, 9, seed=9).to(dtype).to(memory_format=layout)
    with torch.no_grad():
        plain_of = copy.deepcopy(layers)
        truth, plain = copy.deepcopy(layers).double()(x.double()), layers(x)
        magnet_fast.accelerate(layers, pack=True)
        found, again = layers(x), layers(x)
        other_size = layers(x[:1, :, :9])  # the layout of the first call serves any
    norms = sum(hasattr(layer, "running_var") for layer in layers)
    assert (
        type(layers) is PackedSequential
        and len(calls) == 3 * norms
        and ("none" in calls) == (type(layers[-1]) in (nn.BatchNorm2d, BatchNormAct2d, DetrFrozenBatchNorm2d))
    )
    assert torch.equal(found, again) and found.dtype == dtype
    step = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(other_size, plain_of(x[:1, :, :9]), **step)
    error, baseline = (found - truth).abs().max(), (plain - truth).abs().max()
    assert error <= 4 * baseline + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_residual_is_added_in_the_same_call(stride: int, calls: list[str]) -> None:
    block = filled(Bottleneck(16, 4, stride))
    x = values(2, 16, 9, 7)
    with torch.no_grad():
        expected = block(x)
        magnet_fast.accelerate(block, pack=True)
        torch.testing.assert_close(block(x), expected)
        assert calls == (["none"] if stride == 2 else []) + ["relu", "relu", "sum"]
        magnet_fast.restore(block)
        assert torch.equal(block(x), expected) and type(block) is Bottleneck and type(block.branch) is nn.Sequential


def test_bfloat16_where_the_processor_multiplies_it() -> None:
    """What does not work is left out of `DTYPES`, and would not be missed."""
    assert (torch.bfloat16 in DTYPES) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("shape", [(2, 10, 5, 3), (10, 1, 1), (2, 10, 5, 3, "strided"), (2, 10, 5, 3, "last")])
def test_sums_with_residuals_of_any_kind(
    shape: tuple, activation: nn.Module | None, dtype: torch.dtype, calls: list[str]
) -> None:
    layers = filled(nn.Sequential(nn.Conv2d(6, 10, (3, 4), stride=2, padding=(1, 0)), nn.BatchNorm2d(10))).to(dtype)
    x = values(2, 6, 9, 8).to(dtype)
    if "strided" in shape:
        residual = values(10, 2, 3, 5).permute(1, 0, 3, 2).to(dtype)
    else:
        residual = values(*[side for side in shape if side != "last"]).to(dtype)
    if "last" in shape:
        x, residual = (tensor.to(memory_format=torch.channels_last) for tensor in (x, residual))
    with torch.no_grad():
        expected = layers(x) + residual
        _convolution.pack_convolutions(list(layers))
        found = _convolution.run_layers(list(layers), x, residual, activation)
        again = _convolution.run_layers(list(layers), x, residual, activation)
        step = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
        torch.testing.assert_close(found, expected if activation is None else activation(expected), **step)
    assert torch.equal(found, again)  # the residual was not written to
    assert calls == ["sum" if len(shape) > 3 else "none"] * 2


def test_a_subclass_of_ours_and_one_of_others(calls: list[str]) -> None:
    class Theirs(nn.Sequential):
        pass

    ours = filled(ConvBlock(6, 8))
    theirs = filled(Theirs(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)))
    x = values(1, 6, 5, 5)
    with torch.no_grad():
        expected = ours(x)
        magnet_fast.accelerate(nn.ModuleList([ours, theirs]), pack=True)
        theirs(x)
        assert calls == [] and type(theirs) is Theirs
        torch.testing.assert_close(ours(x), expected)
    assert calls == ["relu", "relu"]


def block() -> nn.Sequential:
    return filled(nn.Sequential(nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10), nn.ReLU()))


def statistics(layers: nn.Sequential) -> None:
    layers.train()
    with torch.no_grad():
        layers(values(3, 6, 8, 8, seed=3))
    layers.eval()


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "weight": lambda layers: layers[0].weight.mul_(2),
    "weight's data": lambda layers: layers[0].weight.data.mul_(2),
    "bias": lambda layers: layers[0].bias.data.add_(1),
    "norm's weight": lambda layers: layers[1].weight.data.mul_(-2),
    "norm's bias": lambda layers: layers[1].bias.numpy().__iadd__(1),
    "mean": lambda layers: layers[1].running_mean.add_(1),
    "variance": lambda layers: layers[1].running_var.mul_(4),
    "statistics": statistics,
    "loaded": lambda layers: layers.load_state_dict({name: 2 * t for name, t in layers.state_dict().items()}),
    "another parameter": lambda layers: setattr(layers[0], "weight", nn.Parameter(values(10, 6, 3, 3, seed=4))),
    "another norm": lambda layers: layers.__setitem__(1, filled(nn.BatchNorm2d(10)).requires_grad_(False)),
    "eps": lambda layers: setattr(layers[1], "eps", layers[1].eps + 0.5),
    "bias gone": lambda layers: setattr(layers[0], "bias", None),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str, calls: list[str]) -> None:
    layers, x = block().requires_grad_(False), values(2, 6, 8, 8)
    magnet_fast.accelerate(layers, pack=True)
    before = layers(x)
    for _ in range(2):  # twice: what is folded again is compared with what it is now
        CHANGES[change](layers)
        calls.clear()
        after = layers(x)
        assert calls == ["relu"]
        convolved = F.conv2d(x, layers[0].weight, layers[0].bias)
        norm = layers[1]
        expected = F.batch_norm(convolved, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        torch.testing.assert_close(after, F.relu(expected))
    assert not torch.allclose(before, after)


def hooked(index: int) -> Callable[[nn.Sequential], None]:
    return lambda layers: layers[index].register_forward_hook(lambda module, inputs, output: output)


@torch.inference_mode()
def for_inference() -> nn.Conv2d:
    return nn.Conv2d(6, 10, 3)


ASIDE: dict[str, Callable[[nn.Sequential], object]] = {
    "hook on the convolution": hooked(0),
    "hook on the norm": hooked(1),
    "norm in training": lambda layers: layers[1].train(),
    "forward of its own": lambda layers: setattr(layers[1], "forward", lambda x: x + 1),
    "no statistics": lambda layers: layers.__setitem__(1, nn.BatchNorm2d(10, track_running_stats=False)),
    "made in inference mode": lambda layers: layers.__setitem__(0, for_inference()),
    "reflecting": lambda layers: setattr(layers[0], "padding_mode", "reflect"),
    "not one image": lambda layers: None,
}


@pytest.mark.parametrize("case", ASIDE)
def test_it_steps_aside(case: str, calls: list[str]) -> None:
    layers = block()
    magnet_fast.accelerate(layers, pack=True)
    ASIDE[case](layers)
    x = values(2, 6, 8, 8)
    plain = nn.Sequential(*copy.deepcopy(layers))  # a copy keeps no folded weights
    with torch.no_grad():
        if case == "not one image":
            with pytest.raises(ValueError, match="expected 4D input"):
                layers(x[0])
        else:
            assert torch.equal(layers(x), plain(x))
    assert calls == []


def test_gradients_other_backends_and_the_relu_alone(calls: list[str]) -> None:
    layers, x = block(), values(2, 6, 8, 8)
    magnet_fast.accelerate(layers, pack=True)
    layers(x).sum().backward()
    assert layers[0].weight.grad is not None
    with torch.no_grad(), ops.backend("reference"):
        expected = layers(x)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert layers(x).dtype == torch.float16
    assert calls == []
    seen = []
    layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        torch.testing.assert_close(layers(x), expected)
    assert calls == ["none"] and len(seen) == 1


def test_graphs_hold_the_modules(calls: list[str]) -> None:
    layers, x = block(), values(2, 6, 8, 8)
    magnet_fast.accelerate(layers, pack=True)
    with torch.no_grad():
        expected = nn.Sequential(*layers)(x)
        graphs = [
            torch.fx.symbolic_trace(layers),
            torch.jit.trace(layers, x, check_trace=False),
            torch.export.export(layers, (x,)).module(),
            torch.compile(layers, backend="eager", fullgraph=True),
        ]
        assert all(torch.equal(graph(x), expected) for graph in graphs)
    assert calls == []


def test_copies_go_with_their_layer_and_with_restore(calls: list[str]) -> None:
    gc.collect()
    count = len(_packed._copies)
    layers, x = block(), values(2, 6, 8, 8)
    magnet_fast.accelerate(layers, pack=True)
    with torch.no_grad():
        layers(x)
        assert len(_packed._copies) == count + 1
        magnet_fast.restore(layers)
        assert len(_packed._copies) == count and type(layers) is nn.Sequential
        layers(x)
        first, again = magnet_fast.accelerate(layers, pack=True), magnet_fast.accelerate(layers)
        assert first == again and [module.operator for module in again.replaced] == ["convolution"]
        layers(x)
    del layers
    gc.collect()
    assert len(_packed._copies) == count and calls == ["relu", "relu"]


def test_replaced_for_all_sequentials_since(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    layers = block()
    magnet_fast.accelerate(layers, pack=True)
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: input + 1)
    assert torch.equal(layers(torch.zeros(1, 6, 8, 8)), torch.ones(1, 6, 8, 8)) and calls == []


@pytest.mark.parametrize(
    "there", [{}, {"_convolution_pointwise": lambda *arguments: torch.zeros(1), "_reorder_convolution_weight": None}]
)
def test_operators_that_are_gone_or_compute_something_else(there: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**there))
    assert not _convolution._works.__wrapped__(torch.float32)
