"""Convolutions of inference with the BatchNorm after each folded in, and what follows that, in one call.

In inference a BatchNorm multiplies and shifts each channel by constants, so it can be part of the convolution's weight
and bias. What is left, an activation or the sum with a residual, oneDNN does while the result is in registers.
Otherwise each of them reads and writes the whole map once more. Maps come out with channels last.

The folded weight is a second copy, kept under the same promise as a packed Linear's, and made again when one of the
tensors it comes from is seen to have changed (`_packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import cache, partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.ops import _autocast, _packed, _winograd
from magnet_fast.ops._linear import autocast_on_cpu, inference_on_cpu, plain_weight
from magnet_fast.ops._observed import observed

# Below this, what is saved is less than what it takes to look whether anything changed.
_FEWEST_MULTIPLICATIONS = 1 << 24
_SEQUENTIAL_FORWARD = nn.Sequential.forward


class PackedSequential(nn.Sequential):
    """A Sequential whose convolutions `pack_convolutions` has packed; made by a change of class, as is the way back."""

    _upstream_class = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        if nn.Sequential.forward is not _SEQUENTIAL_FORWARD:  # replaced for all Sequentials since
            return super().forward(input)
        return run_layers(list(self), input)


def has_foldable(layers: Sequence[nn.Module]) -> bool:
    """Whether a BatchNorm follows one of the convolutions."""
    return any(_foldable(*pair) for pair in pairwise(_active(layers)))


def pack_convolutions(layers: Sequence[nn.Module]) -> None:
    """Let the convolutions that a BatchNorm follows keep folded weights."""
    for convolution, norm in pairwise(_active(layers)):
        if _foldable(convolution, norm):
            _packed.pack(convolution)


def unpack_convolutions(layers: Sequence[nn.Module]) -> None:
    """Undo `pack_convolutions`; the copies are gone."""
    for layer in layers:
        if type(layer) is nn.Conv2d:
            _packed.unpack(layer)


def run_layers(
    layers: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None, activation: nn.Module | None = None
) -> Tensor:
    """The layers one after the other, then, given a residual, the sum with it and the activation of that.

    A convolution and the BatchNorm after it, with the activation or the residual that follows, are one call where the
    convolution is packed, in inference in float32 or bfloat16 on an x86 CPU, also under autocast to bfloat16;
    everything else is called as a module.

    Args:
        layers: modules of one input each.
        x: input of the first.
        residual: of the last one's size, or None.
        activation: what is done to the sum with the residual, or None.
    """
    layers = _active(layers)
    index, count = 0, len(layers)
    allowed = None  # asked of x when it is needed, and again when a module gave x
    while index < count:
        layer = layers[index]
        norm = layers[index + 1] if index + 1 < count else None
        folded = None
        if norm is not None and type(layer) is nn.Conv2d and _worth(layer, x):
            allowed = _allowed(x) if allowed is None else allowed
            folded = _folded(layer, norm, x) if allowed else None
        if folded is None:
            x, allowed = layer(x), None
            index += 1
            continue
        x = _autocast.cast(x)  # as the convolution would
        index += 2
        unary = _unary_within(norm)
        if unary is None and index < count and (unary := _unary(layers[index])) is not None:
            index += 1
        if unary is None and index == count and residual is not None and _adds(residual, layer, x):
            rectified = type(activation) is nn.ReLU and not observed(activation)
            x = _convolve(x, folded, _NONE, residual, "relu" if rectified else None)
            return x if rectified or activation is None else activation(x)
        x = _convolve(x, folded, unary or _NONE)
    if residual is None:
        return x
    return x + residual if activation is None else activation(x + residual)


def _active(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Without those that do nothing."""
    return [layer for layer in layers if type(layer) is not nn.Identity or observed(layer)]


class _Unary(NamedTuple):
    """An activation as oneDNN's operators take it."""

    name: str
    scalars: list[float]
    algorithm: str


_NONE = _Unary("none", [], "")
_UNARIES = {
    nn.ReLU: _Unary("relu", [], ""),
    nn.ReLU6: _Unary("hardtanh", [0.0, 6.0], ""),
    nn.SiLU: _Unary("swish", [], ""),
    nn.Hardswish: _Unary("hardswish", [], ""),
}
_INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "hardtanh": partial(F.relu6, inplace=True),
    "swish": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
}
"""What `_winograd` does not do with the result while it has it."""


def _unary(layer: nn.Module) -> _Unary | None:
    """The activation that a layer is, if oneDNN has it and nobody watches the layer."""
    return None if (found := _UNARIES.get(type(layer))) is None or observed(layer) else found


def _unary_within(norm: nn.Module) -> _Unary | None:
    """The activation that is part of a norm of timm's."""
    return _unary(norm.act) if _norm_kind(type(norm)) is _Norm.ACTIVATED else None


class _Folded(NamedTuple):
    """A convolution that does the work of two, as oneDNN's operators or `_winograd` take it."""

    weight: Tensor
    bias: Tensor
    shape: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
    winograd: bool


def _convolve(
    x: Tensor, folded: _Folded, unary: _Unary, residual: Tensor | None = None, after_sum: Literal["relu"] | None = None
) -> Tensor:
    weight, bias, shape, winograd = folded
    if winograd:
        rectify = unary.name == "relu" or after_sum == "relu"
        y = _winograd.run(x, weight, bias, residual, rectify)
        return _INPLACE[unary.name](y) if unary.name in _INPLACE else y
    if residual is not None:
        operator = torch.ops.mkldnn._convolution_pointwise.binary
        if after_sum and x.dtype != torch.float32 and not (_channels_last(x) and _channels_last(residual)):
            # Then PyTorch adds by a function of its own, which has no 16-bit form with the activation.
            return F.relu_(operator(x, residual, weight, bias, *shape, "add", None, None, [], None))
        return operator(x, residual, weight, bias, *shape, "add", None, after_sum, [], None)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, *unary)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _worth(convolution: nn.Conv2d, x: Tensor) -> bool:
    """What is quickly said: small models are dozens of convolutions that this is not for. No proxy of a graph is."""
    if type(x) is not Tensor or x.dim() != 4:
        return False
    return x.numel() // x.shape[1] * convolution.weight.numel() >= _FEWEST_MULTIPLICATIONS


def _allowed(x: Tensor) -> bool:
    """Whether this is inference that oneDNN's operators may take."""
    return _inference(x) and torch.backends.mkldnn.enabled and _works(_computed(x))


def _computed(x: Tensor) -> torch.dtype:
    """What a convolution of x computes in; autocast to another dtype than bfloat16 is not `_allowed`."""
    return torch.bfloat16 if _autocast.active(x) else x.dtype


def _inference(x: Tensor, *others: Tensor) -> bool:
    """Whether a product of these tensors is inference on the CPU, as they are or as autocast makes them."""
    return autocast_on_cpu(x, *others) if _autocast.active(x) else inference_on_cpu(x, *others)


def _folded(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> _Folded | None:
    """The two as one, made in the first call and when something changed; None where they are called as modules."""
    if not _foldable(convolution, norm) or norm.training or observed(convolution, norm):
        return None
    sources, autocast = _sources(convolution, norm), _autocast.active(x)
    if sources[0].dtype != x.dtype and not autocast:
        return None
    if autocast and _norm_kind(type(norm)) is _Norm.FROZEN:
        return None  # what it multiplies by is in float32, and so are its results, where a BatchNorm's are x's
    shape = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
    dtype = _computed(x)
    winograd = dtype == x.dtype and _winograd.takes(convolution, x)
    layout = f"winograd, {_winograd.level()}" if winograd else f"folded, {dtype}"

    def make() -> _Folded | None:
        if not _inference(x, *sources):
            return None
        weight, bias = _fold(convolution, norm, dtype)
        if winograd:
            return _Folded(_winograd.pack(weight), bias, shape, True)
        # The layout is chosen for this size; it is right for any.
        return _Folded(torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, x.shape), bias, shape, False)

    return _packed.folded(convolution, layout, (_eps(norm), shape), sources, make)


def _fold(convolution: nn.Conv2d, norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of both, computed in float32."""
    scale = torch.rsqrt(norm.running_var.float() + _eps(norm))
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    bias = -norm.running_mean.float() if convolution.bias is None else convolution.bias.float() - norm.running_mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.float()
    weight = convolution.weight.float() * scale[:, None, None, None]
    return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)


class _Norm(Enum):
    """Kinds of norms that a convolution takes with it."""

    PLAIN = "PyTorch's BatchNorm2d"
    FROZEN = "one with statistics that no training changes, of torchvision's or transformers'"
    ACTIVATED = "timm's, with an activation as part of it"


@cache
def _norm_kind(cls: type) -> _Norm | None:
    if cls is nn.BatchNorm2d:
        return _Norm.PLAIN
    if f"{cls.__module__}.{cls.__qualname__}" == "timm.layers.norm_act.BatchNormAct2d":
        return _Norm.ACTIVATED
    library = cls.__module__.partition(".")[0]
    if library in ("torchvision", "transformers") and cls.__name__.endswith("FrozenBatchNorm2d"):
        return _Norm.FROZEN if _normalises(cls) else None
    return None


def _normalises(cls: type) -> bool:
    """Whether a frozen norm computes what is folded here: each library has a copy of its own, tried out once."""
    try:
        with torch.device("cpu"):
            norm = cls(3).to(torch.float32)
        names = ("weight", "bias", "running_mean", "running_var")
        if [name for name, _ in norm.named_buffers()] != list(names) or next(norm.parameters(), None) is not None:
            return False
        numbers = [[2.0, -1.0, 0.5], [0.5, 1.0, -2.0], [1.0, 0.25, -1.0], [0.0, 4.0, 1e-5]]
        values = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        for name, value in zip(names, values, strict=True):
            getattr(norm, name).copy_(value)
        x = torch.arange(-6.0, 6.0, dtype=torch.float32, device="cpu").view(1, 3, 2, 2)
        weight, bias, mean, variance = values[:, :, None, None]
        return torch.allclose(norm(x), (x - mean) / torch.sqrt(variance + _eps(norm)) * weight + bias)
    except (TypeError, RuntimeError, AttributeError):  # made or written in another way by now
        return False


def _eps(norm: nn.Module) -> float:
    """transformers' frozen norms have it in their code alone."""
    return getattr(norm, "eps", 1e-5)


def _adds(residual: Tensor, convolution: nn.Conv2d, x: Tensor) -> bool:
    """Whether the convolution of `x` may add a residual: one value for each of its own."""
    size = zip(x.shape[2:], convolution.padding, convolution.dilation, convolution.kernel_size, strict=True)
    covered = (side + 2 * padding - dilation * (kernel - 1) for side, padding, dilation, kernel in size)
    sides = ((one - 1) // stride + 1 for one, stride in zip(covered, convolution.stride, strict=True))
    shape = (x.shape[0], convolution.out_channels, *sides)
    return residual.shape == shape and residual.dtype == x.dtype and _inference(residual, x)


def _sources(convolution: nn.Conv2d, norm: nn.Module) -> list[Tensor]:
    """The weight first. Read where modules keep them: as attributes they are searched for, which takes as long again as
    all the rest that a call asks."""
    given, held = convolution._parameters, {**norm._buffers, **norm._parameters}
    tensors = (given["weight"], given.get("bias"), *map(held.get, ("weight", "bias", "running_mean", "running_var")))
    return [tensor for tensor in tensors if tensor is not None]


def _foldable(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether they are what their libraries make them, one reading the other."""
    return (
        type(convolution) is nn.Conv2d
        and _norm_kind(type(norm)) is not None
        and plain_weight(convolution)
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and norm.running_mean is not None
        and convolution.out_channels == len(norm.running_mean)
        and _foldable_activation(norm)
    )


def _foldable_activation(norm: nn.Module) -> bool:
    """Whether nothing, or an activation that oneDNN has, is part of the norm."""
    return _norm_kind(type(norm)) is not _Norm.ACTIVATED or (
        type(norm.drop) is nn.Identity
        and (type(norm.act) is nn.Identity or type(norm.act) in _UNARIES)
        and not observed(norm.drop, norm.act)
    )


@cache
@_autocast.off
def _works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators and they compute what they are taken for; x86 from AVX2 on only."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    ramp = torch.linspace(-1, 1, 4 * 3 * 3 * 3, dtype=torch.float32, device="cpu")
    weight, x = ramp.view(4, 3, 3, 3).roll(5, 0), torch.cat([ramp, ramp.flip(0)]).view(2, 3, 6, 6)
    weight, x = weight.to(dtype), x.to(dtype, memory_format=torch.channels_last)
    bias, shape = weight[:, 0, 0, 0].contiguous(), ((1, 1), (1, 1), (1, 1), 1)
    expected = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    other = expected.flip(0).to(dtype, memory_format=torch.channels_last)
    try:
        operator, reorder = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._reorder_convolution_weight
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        pairs = [
            (operator(x, weight, bias, *shape, "none", [], ""), expected),
            *((operator(x, weight, bias, *shape, *unary), cls()(expected)) for cls, unary in _UNARIES.items()),
            (
                operator.binary(x, other, weight, bias, *shape, "add", None, "relu", [], None),
                F.relu(expected + other.float()),
            ),
            (operator.binary(x, other, weight, bias, *shape, "add", None, None, [], None), expected + other.float()),
            (operator(x, reorder(weight, *shape, x.shape), bias, *shape, "none", [], ""), expected),
        ]
    except (AttributeError, TypeError, RuntimeError):  # gone, or called in another way by now
        return False
    step = 1e-5 if dtype == torch.float32 else 2e-2
    return all(torch.allclose(found.float(), truth, rtol=step, atol=step) for found, truth in pairs)
