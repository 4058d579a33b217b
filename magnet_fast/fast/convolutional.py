"""Convolutional blocks of other libraries: norms folded in, activation and residual in the convolution's own call.

For packed weights alone (`accelerate(model, pack=True)`): a block then calls its convolutions as `run_layers` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from magnet_fast.fast._replacement import Replacement, must_run_original, names
from magnet_fast.ops._convolution import PackedSequential, has_foldable, run_layers
from magnet_fast.ops._linear import recorded
from magnet_fast.ops._observed import observed


class FoldedBlock:
    """A block whose layers stand in its attributes."""

    _layers: tuple[str, ...]

    @classmethod
    def layers_of(cls, block: nn.Module) -> list[nn.Module]:
        """In the order they are called in; what is None, or not there, is not called."""
        layers = (getattr(block, name, None) for name in cls._layers)
        return [layer for layer in layers if layer is not None]

    def _as_written(self) -> bool:
        return recorded() or must_run_original(self)


class _Chain(FoldedBlock):
    """Layers one after the other, and nothing else."""

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        if named or len(inputs) != 1 or self._as_written():
            return super().forward(*inputs, **named)
        return run_layers(self.layers_of(self), *inputs)


class _Sequential(_Chain):
    """Those of a Sequential."""

    @classmethod
    def layers_of(cls, block: nn.Module) -> list[nn.Module]:
        return list(block)


class _Residual(FoldedBlock):
    """A ResNet's block of timm's or torchvision's, whose attribute `downsample` is the shortcut, if it has one."""

    _activation: str

    def forward(self, x: Tensor) -> Tensor:
        if self._as_written():
            return super().forward(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return run_layers(self.layers_of(self), x, shortcut, getattr(self, self._activation))


class _Inverted(FoldedBlock):
    """A block of timm's EfficientNets: nothing is done to the sum with the input, where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        if self._as_written():
            return super().forward(x)
        layers = self.layers_of(self)
        if not self.has_skip:
            return run_layers(layers, x)
        # In inference the drop of whole paths does nothing.
        dropped = self.drop_path.training or observed(self.drop_path) or not _drops_paths(self.drop_path)
        return run_layers([*layers, self.drop_path] if dropped else layers, x, x)


class _ResidualOfLayers(FoldedBlock):
    """A ResNet's block of transformers': its `layer` are convolutional layers, the last without an activation."""

    @classmethod
    def layers_of(cls, block: nn.Module) -> list[nn.Module]:
        return []  # each of the layers packs its own

    def forward(self, hidden_state: Tensor) -> Tensor:
        layers = self.layer
        if self._as_written() or type(layers) not in (nn.Sequential, PackedSequential) or not layers:
            return super().forward(hidden_state)
        *first, last = layers
        if observed(layers, last) or not isinstance(last, _Chain):
            return super().forward(hidden_state)
        shortcut = self.shortcut(hidden_state)
        for layer in first:
            hidden_state = layer(hidden_state)
        return run_layers(last.layers_of(last), hidden_state, shortcut, self.activation)


class _RepVgg(FoldedBlock):
    """RT-DETR's two convolutions of one map: the second one adds what the first gave."""

    @classmethod
    def layers_of(cls, block: nn.Module) -> list[nn.Module]:
        return []

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv1, self.conv2
        if self._as_written() or observed(second) or not isinstance(second, _Chain):
            return super().forward(x)
        return run_layers(second.layers_of(second), x, first(x), self.activation)


class _ResNetStem(FoldedBlock):
    """timm's ResNet: the first convolution, or the last of several, with what follows it."""

    @classmethod
    def layers_of(cls, block: nn.Module) -> list[nn.Module]:
        several = type(block.conv1) in (nn.Sequential, PackedSequential)
        return [*(block.conv1 if several else [block.conv1]), block.bn1, block.act1]

    def forward_features(self, x: Tensor) -> Tensor:
        if self._as_written() or self.grad_checkpointing or observed(self.conv1):
            return super().forward_features(x)
        x = self.maxpool(run_layers(self.layers_of(self), x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x


class _EfficientNetEnds(FoldedBlock):
    """timm's EfficientNet: the first convolution and the last."""

    _layers = ("conv_stem", "bn1", "conv_head", "bn2")

    def forward_features(self, x: Tensor) -> Tensor:
        if self._as_written() or self.grad_checkpointing:
            return super().forward_features(x)
        stem, head = [self.conv_stem, self.bn1], [self.conv_head, self.bn2]
        return run_layers(head, self.blocks(run_layers(stem, x)))


class _TorchvisionStem(FoldedBlock):
    """torchvision's ResNet: the first convolution with what follows it."""

    _layers = ("conv1", "bn1", "relu")

    def _forward_impl(self, x: Tensor) -> Tensor:
        if self._as_written():
            return super()._forward_impl(x)
        x = self.maxpool(run_layers(self.layers_of(self), x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _drops_paths(layer: nn.Module) -> bool:
    return f"{type(layer).__module__}.{type(layer).__qualname__}" in (
        "timm.layers.drop.DropPath",
        "torch.nn.modules.linear.Identity",
    )


def _replacement(
    path: str,
    form: type,
    layers: str = "",
    *,
    method: str = "forward: x",
    more: str = "",
    activation: str = "",
) -> Replacement:
    """One class.

    Args:
        layers: names of its layers in their order, all of which it has.
        method: that is replaced, and its parameter.
        more: other attributes that are read.
        activation: of the sum with the residual.
    """
    name, parameter = method.split(": ")
    order = tuple(layers.split())
    library, kind = path.partition(".")[0], path.rpartition(".")[2]
    mixin = form
    if order:
        mixin = type(form.__name__, (form,), {"_layers": order, "_activation": activation, "__doc__": form.__doc__})
    return Replacement(
        path=path,
        mixin=mixin,
        operator="convolution",
        parameters={name: (names(parameter), names())},
        attributes=tuple(one for one in (*order, *more.split(), activation) if one),
        bypassed={},
        unfit=lambda module: _unfit(mixin.layers_of(module)),
        note=lambda module: "in inference on a CPU BatchNorms are folded into convolutions",
        name=f"{library.capitalize()}{kind}",
    )


def _unfit(layers: Sequence[nn.Module]) -> str | None:
    return "no BatchNorm follows its convolutions" if layers and not has_foldable(layers) else None


def _torchvision() -> Sequence[Replacement]:
    resnet = "torchvision.models.resnet."
    first = "conv1 bn1 relu conv2 bn2"
    return (
        _replacement(f"{resnet}BasicBlock", _Residual, first, more="downsample", activation="relu"),
        _replacement(f"{resnet}Bottleneck", _Residual, f"{first} relu conv3 bn3", more="downsample", activation="relu"),
        _replacement(
            f"{resnet}ResNet",
            _TorchvisionStem,
            method="_forward_impl: x",
            more="conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc",
        ),
        _replacement("torchvision.ops.misc.Conv2dNormActivation", _Sequential, method="forward: input"),
    )


def _timm() -> Sequence[Replacement]:
    resnet, efficientnet = "timm.models.resnet.", "timm.models._efficientnet_blocks."
    after = "se drop_path"
    space = "conv_s2d bn_s2d"
    return (
        _replacement(
            f"{resnet}BasicBlock",
            _Residual,
            f"conv1 bn1 drop_block act1 aa conv2 bn2 {after}",
            more="downsample",
            activation="act2",
        ),
        _replacement(
            f"{resnet}Bottleneck",
            _Residual,
            f"conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 {after}",
            more="downsample",
            activation="act3",
        ),
        _replacement(
            f"{resnet}ResNet",
            _ResNetStem,
            method="forward_features: x",
            more="conv1 bn1 act1 maxpool layer1 layer2 layer3 layer4 grad_checkpointing",
        ),
        _replacement(
            f"{efficientnet}InvertedResidual",
            _Inverted,
            f"{space} conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3",
            more="has_skip drop_path",
        ),
        _replacement(
            f"{efficientnet}DepthwiseSeparableConv",
            _Inverted,
            f"{space} conv_dw bn1 aa se conv_pw bn2",
            more="has_skip drop_path",
        ),
        _replacement(
            f"{efficientnet}EdgeResidual", _Inverted, "conv_exp bn1 aa se conv_pwl bn2", more="has_skip drop_path"
        ),
        _replacement(f"{efficientnet}ConvBnAct", _Inverted, "conv bn1 aa", more="has_skip drop_path"),
        _replacement(
            "timm.models.efficientnet.EfficientNet",
            _EfficientNetEnds,
            method="forward_features: x",
            more="conv_stem bn1 blocks conv_head bn2 grad_checkpointing",
        ),
        _replacement("timm.layers.conv_bn_act.ConvNormAct", _Chain, "conv bn aa"),
    )


def _transformers() -> Sequence[Replacement]:
    found = []
    for path in ("resnet.modeling_resnet.ResNet", "rt_detr.modeling_rt_detr_resnet.RTDetrResNet"):
        prefix = f"transformers.models.{path}"
        layers, read = "convolution normalization", "shortcut layer activation"
        found += [
            _replacement(f"{prefix}ConvLayer", _Chain, f"{layers} activation", method="forward: hidden_states"),
            _replacement(f"{prefix}ShortCut", _Chain, layers, method="forward: input"),
            *(
                _replacement(f"{prefix}{kind}", _ResidualOfLayers, method="forward: hidden_state", more=read)
                for kind in ("BasicLayer", "BottleNeckLayer")
            ),
        ]
    for path in ("rt_detr.modeling_rt_detr.RTDetr", "rt_detr_v2.modeling_rt_detr_v2.RTDetrV2"):
        prefix = f"transformers.models.{path}"
        found += [
            _replacement(f"{prefix}ConvNormLayer", _Chain, "conv norm activation", method="forward: hidden_state"),
            _replacement(f"{prefix}RepVggBlock", _RepVgg, more="conv1 conv2 activation"),
        ]
    return found


REPLACEMENTS = (*_torchvision(), *_timm(), *_transformers())
