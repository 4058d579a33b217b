"""Convolutional blocks of other libraries with packed weights: norms, activations and sums folded in."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from magnet_fast.fast._replacement import upstream_class
from magnet_fast.ops import _convolution, _packed
from tests.onednn import needs_onednn

from . import zoo

SIZE = (43, 36)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Convolutions, of any size, that took their norm with them."""
    found: list[Any] = []
    convolve = _convolution._convolve

    def counted(x: Tensor, folded: Any, *rest: Any) -> Tensor:
        found.append(folded)
        return convolve(x, folded, *rest)

    monkeypatch.setattr(_convolution, "_convolve", counted)
    monkeypatch.setattr(_convolution, "_FEWEST_MULTIPLICATIONS", 0)
    return found


def timm_resnet(block: str, **options: object) -> nn.Module:
    from timm.models import resnet

    layers = (1, 2, 1, 1)
    return resnet.ResNet(getattr(resnet, block), layers, num_classes=5, channels=(8, 16, 16, 24), **options)


def timm_efficientnet(blocks: list[list[str]]) -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    return EfficientNet(decode_arch_def(blocks), num_classes=5, num_features=24, stem_size=8, act_layer=nn.SiLU)


def timm_layer() -> nn.Module:
    from timm.layers import ConvNormAct

    return ConvNormAct(3, 10, kernel_size=3, stride=2, groups=1, act_layer=nn.Hardswish)


def torchvision_resnet(block: str, **options: object) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=5, **options)


def frozen_torchvision_resnet() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return torchvision_resnet("BasicBlock", norm_layer=FrozenBatchNorm2d)


def torchvision_mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(width_mult=0.1, num_classes=5)


def transformers_resnet(kind: str) -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type=kind))


class Pyramid(nn.Module):
    """RT-DETR's backbone with frozen norms, and a layer of the pyramid after it."""

    def __init__(self, path: str, prefix: str) -> None:
        from transformers import RTDetrConfig, RTDetrResNetBackbone, RTDetrResNetConfig

        super().__init__()
        module = importlib.import_module(f"transformers.models.{path}.modeling_{path}")
        config = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], out_features=["stage2"])
        self.backbone = RTDetrResNetBackbone(config)
        with torch.no_grad():
            module.replace_batch_norm(self.backbone)
        layer = getattr(module, f"{prefix}CSPRepLayer")
        self.pyramid = layer(RTDetrConfig(encoder_hidden_dim=16, hidden_expansion=0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.pyramid(self.backbone(x).feature_maps[-1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm, basic blocks": lambda: timm_resnet("BasicBlock", stem_type="deep", avg_down=True),
    "timm, bottlenecks": lambda: timm_resnet("Bottleneck", cardinality=2, base_width=8, output_stride=16),
    "timm, squeezed": lambda: timm_resnet("Bottleneck", block_args={"attn_layer": "se"}, drop_path_rate=0.1),
    "timm, EfficientNet": lambda: timm_efficientnet(
        [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k5_s2_e2_c12_se0.25"], ["er_r1_k3_s2_e2_c12"], ["cn_r2_k3_s1_c12_skip"]]
    ),
    "timm, one layer": timm_layer,
    "torchvision, basic blocks": lambda: torchvision_resnet("BasicBlock"),
    "torchvision, bottlenecks": lambda: torchvision_resnet("Bottleneck", groups=4, width_per_group=4),
    "torchvision, frozen": frozen_torchvision_resnet,
    "torchvision, MobileNet": torchvision_mobilenet,
    "transformers, basic": lambda: transformers_resnet("basic"),
    "transformers, bottlenecks": lambda: transformers_resnet("bottleneck"),
    "RT-DETR": lambda: Pyramid("rt_detr", "RTDetr"),
    "RT-DETR v2": lambda: Pyramid("rt_detr_v2", "RTDetrV2"),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With weights and statistics as after some training."""
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var") or (tensor.dim() == 1 and key.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.dim() == 1:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval().to(dtype)


def normed(model: nn.Module) -> int:
    """How many convolutions have a norm over their channels."""
    return sum(hasattr(module, "running_var") for module in model.modules())


@needs_onednn
@pytest.mark.parametrize("name", MODELS)
def test_against_float64_and_the_way_back(name: str, calls: list[Any]) -> None:
    model = model_of(name)
    x = zoo.image(SIZE, batch=3)
    before = {key: (type(module), set(vars(module))) for key, module in model.named_modules()}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kept = len(_packed._copies)
    with torch.no_grad():
        expected = zoo.call(model, x)
        truth = zoo.call(copy.deepcopy(model).double(), x)
        report = magnet_fast.accelerate(model, pack=True)
        found, again = zoo.call(model, x), zoo.call(model, x[:1, :, 3:])
        copied = zoo.call(pickle.loads(pickle.dumps(copy.deepcopy(model))), x)
        assert not report.left_alone and magnet_fast.accelerate(model, pack=True) == report
        assert len(calls) == 2 * normed(model)  # and not in copies, which keep no packed weights
        for ours, theirs, exact, copies in zip(found, expected, truth, copied, strict=True):
            error, baseline = (ours - exact).abs().max(), (theirs - exact).abs().max()
            assert error <= 4 * baseline + 1e-6 * exact.abs().max()
            torch.testing.assert_close(copies, theirs, rtol=1e-3, atol=1e-5)
        magnet_fast.restore(model)
        for ours, theirs in zip(zoo.call(model, x[:1, :, 3:]), again, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(zoo.call(model, x), expected, strict=True))
    assert {key: (type(module), set(vars(module))) for key, module in model.named_modules()} == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert len(_packed._copies) == kept


@needs_onednn
def test_low_precision(calls: list[Any]) -> None:
    x = zoo.image(SIZE)
    with torch.no_grad():
        (truth,) = zoo.call(model_of("timm, bottlenecks"), x)
        model = model_of("timm, bottlenecks", torch.bfloat16)
        (plain,) = zoo.call(model, x)
        magnet_fast.accelerate(model, pack=True)
        (found,) = zoo.call(model, x)
    assert bool(calls) == _convolution._works(torch.bfloat16) and found.dtype == torch.bfloat16
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2**-8 * truth.abs().max()


@needs_onednn
@pytest.mark.parametrize("name", ["torchvision, bottlenecks", "transformers, basic", "timm, EfficientNet", "RT-DETR"])
def test_changed_weights_and_statistics_are_seen(name: str, calls: list[Any]) -> None:
    model, x = model_of(name), zoo.image(SIZE)
    with torch.no_grad():
        magnet_fast.accelerate(model, pack=True)
        zoo.call(model, x)
        for key, tensor in model.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                tensor.mul_(1.3)
            elif tensor.dim() == 4:
                tensor.mul_(0.9)
        calls.clear()
        found = zoo.call(model, x)
        assert len(calls) == normed(model)
        magnet_fast.restore(model)
        for ours, theirs in zip(found, zoo.call(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision, bottlenecks", "transformers, bottlenecks", "timm, squeezed"])
def test_training_is_as_without(name: str, calls: list[Any]) -> None:
    states = []
    for pack in (False, True):
        model = model_of(name).train()
        magnet_fast.accelerate(model, pack=pack)
        torch.manual_seed(2)
        sum(tensor.square().sum() for tensor in zoo.call(model, zoo.image(SIZE))).backward()
        states.append([*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())])
    assert not calls and all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("name", ["torchvision, MobileNet", "timm, basic blocks", "timm, EfficientNet", "RT-DETR"])
def test_only_packed_weights_replace_blocks(name: str) -> None:
    model = model_of(name)
    magnet_fast.accelerate(model)
    assert all(upstream_class(module) is None for module in model.modules())


def exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], module)


WATCHED = {
    "timm, bottlenecks": ("layer2.1.bn2", "layer2.1.act3", "layer2.1.aa", "bn1", "layer2.0.downsample"),
    "timm, EfficientNet": ("blocks.1.1.bn2.act", "blocks.1.1.bn3", "blocks.1.1.drop_path", "bn2"),
    "torchvision, basic blocks": ("layer2.1.relu", "layer2.1.bn2", "conv1"),
    "transformers, bottlenecks": (
        "encoder.stages.1.layers.1.layer.2", "encoder.stages.1.layers.1.layer",
        "encoder.stages.1.layers.1.layer.2.activation", "encoder.stages.1.layers.1.activation",
    ),
    "RT-DETR": ("pyramid.bottlenecks.1.conv2", "pyramid.bottlenecks.1.conv2.norm", "pyramid.bottlenecks.1.activation"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["hook", "another"])
@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in WATCHED.items() for part in parts])
def test_what_is_watched_or_exchanged_is_called(name: str, part: str, how: str) -> None:
    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(part)
            return 0.5 * self.inner(x)

    model, x, seen = model_of(name), zoo.image(SIZE), []
    inner = model.get_submodule(part)
    with torch.no_grad():
        magnet_fast.accelerate(model, pack=True)
        zoo.call(model, x)
        if how == "hook":
            inner.register_forward_hook(lambda module, inputs, output: seen.append(part) or 0.5 * output)
        else:
            exchange(model, part, Other(inner))
        found = zoo.call(model, x)
        count = len(seen)
        magnet_fast.restore(model)
        for ours, theirs in zip(found, zoo.call(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert count == len(seen) - count > 0


def test_graphs_hold_the_modules(calls: list[Any]) -> None:
    torch.compiler.reset()
    block = model_of("torchvision, bottlenecks").layer2[1]
    x = zoo.image((9, 7), channels=512)
    with torch.no_grad():
        expected = block(x)
        magnet_fast.accelerate(block, pack=True)
        for graph in (torch.fx.symbolic_trace(block), torch.export.export(block, (x,)).module()):
            assert torch.equal(graph(x), expected)
        assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), expected)
    assert calls == []


def test_what_is_not_known_is_left_alone(calls: list[Any]) -> None:
    from torchvision.models.resnet import BasicBlock

    class Theirs(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleList(
        [
            Theirs(4, 4),
            BasicBlock(4, 4, norm_layer=lambda channels: nn.GroupNorm(2, channels)),
            BasicBlock(4, 4),
        ]
    ).eval()
    model[2].forward = lambda x: x + 1
    report = magnet_fast.accelerate(model, pack=True)
    remarks = {module.name: module.remark for module in report.left_alone}
    assert not report.replaced and remarks == {
        "0": "a subclass of BasicBlock: what it changes is not known here",
        "1": "no BatchNorm follows its convolutions",
        "2": "its forward was replaced on the module itself",
    }
    with torch.no_grad():
        assert torch.equal(model[2](torch.zeros(1, 4, 3, 3)), torch.ones(1, 4, 3, 3)) and not calls
