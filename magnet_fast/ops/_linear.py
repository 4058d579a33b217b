"""A Linear layer and what follows it, in one product of oneDNN's.

PyTorch gives float32 products on a CPU to MKL, and to oneDNN, which is part of the same build, those of a convolution
and those in bfloat16. On a processor of AMD's oneDNN is the faster of the two, and what follows a product, GELU, ReLU
or the sum with a residual, it does while the result is still in registers, in bfloat16 before it is rounded. The
operators it has for a Linear are those that PyTorch's own compiler calls; they are not part of PyTorch's public
interface, so they are tried out once before they are used. They read the weights as they lie, so a weight that changes
is seen; a weight that is promised not to change is packed once (`_packed`), for autocast to bfloat16 in that dtype:
PyTorch keeps no cast weight where there are no gradients, and casts it in every call. In training oneDNN is taken where
it was measured to be the faster (`_training_products`).
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.ops import _autocast, _int8, _packed, _training_products
from magnet_fast.ops._observed import moded
from magnet_fast.ops._registry import NO_KERNEL, Explanation, Layer, register_layer, requested_backend

Activation = Literal["gelu", "relu"]
_ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu}

# Below this, calling oneDNN takes longer than the product.
_FEWEST_MULTIPLICATIONS = 1 << 21


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)`, then exact GELU or ReLU if asked for, or plus `residual`.

    In inference (no gradients) in float32 or bfloat16 on an x86 CPU that is one call of oneDNN, under autocast to
    bfloat16 where the weight is packed, and so are the products of training in float32 that `accelerate` has measured
    to be faster so. Anywhere else, in a graph that is being taken, and where `magnet_fast.ops.backend` asks for the
    reference, it is PyTorch's own functions one after the other. All agree within the rounding of the dtype.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D), or None.
        activation: not together with a residual.
        residual: (..., D), or None.

    Returns:
        (..., D).

    Raises:
        ValueError: an activation and a residual at once.
    """
    _check_form(activation, residual)
    if _goes_low(x, weight, bias):
        return _in_autocast(x, weight, bias, activation, residual)
    if (copy := _int8_copy(x, weight, bias, residual)) is not None:
        return _int8.linear(x, copy, bias, activation, residual)
    if _takes_onednn(x, weight, bias, residual):
        return _onednn(x, weight, bias, activation, residual)
    if _trains_by_onednn(x, weight, bias):
        relu = activation == "relu"
        out = _training_products.linear(x, weight, bias, relu)
        return then(out, None if relu else activation, residual)
    return then(F.linear(x, weight, bias), activation, residual)


torch.fx.wrap("linear")


_LINEAR_FORWARD = nn.Linear.forward


class MeasuredLinear(nn.Linear):
    """A Linear in training on a CPU, for machines where oneDNN was measured to be the faster at some of its products.

    Made of an `nn.Linear` by a change of class, and so is the way back; parameters, names and the state dict are the
    same. Wherever `linear` does not take oneDNN, it computes as an `nn.Linear` does.
    """

    _upstream_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        # Or it is replaced for all Linears since.
        if small(self, input) or nn.Linear.forward is not _LINEAR_FORWARD:
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class PackedLinear(MeasuredLinear):
    """A Linear whose weight is promised to stay as it is, so that inference on a CPU may keep a packed copy of it.

    In all else it is a `MeasuredLinear`.
    """

    _upstream_class = nn.Linear


LINEARS = (nn.Linear, MeasuredLinear, PackedLinear)


def plain_linear(*layers: nn.Module) -> bool:
    """Whether all are Linears and nothing else: not quantised, adapted, parametrised, or sharded one by one."""
    return all(type(layer) in LINEARS and plain_weight(layer) for layer in layers)


def plain_weight(layer: nn.Module) -> bool:
    """Whether the layer's weight is an ordinary tensor: some quantise by a subclass and leave the layer's class."""
    weight = layer._parameters.get("weight")
    return weight is None or type(weight) in (nn.Parameter, Tensor)


def small(layer: nn.Module, x: Tensor) -> bool:
    """Whether `linear` surely leaves a layer's product to PyTorch, being small; quickly said, of any module."""
    # In a graph that is taken sizes may be unknown, and a mode would see that they are asked for.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or moded() or not isinstance(x, Tensor):
        return False
    return x.numel() * layer.__dict__.get("out_features", 0) < _FEWEST_MULTIPLICATIONS


def measure_linear(layer: nn.Linear) -> None:
    """Let a plain Linear take what was measured; `unpack_linear` is the way back."""
    layer.__class__ = MeasuredLinear


def pack_linear(layer: nn.Linear, *, int8: bool = False) -> None:
    """Give a plain Linear a packed copy of its weight, in int8 if asked for."""
    _packed.pack(layer, int8=int8)
    layer.__class__ = PackedLinear


def unpack_linear(layer: MeasuredLinear) -> None:
    """Undo `pack_linear` or `measure_linear`; a copy is gone."""
    _packed.unpack(layer)
    layer.__class__ = nn.Linear


def then(out: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
    """What follows a Linear, as PyTorch's own functions."""
    out = _ACTIVATIONS[activation](out)
    return out if residual is None else residual + out


def inference_on_cpu(x: Tensor, *others: Tensor) -> bool:
    """Whether a product of these tensors is inference on the CPU that a kernel may take: see `linear`."""
    return _why_no_inference_on_cpu(x, *others) is None and requested_backend("linear") in ("auto", "cpu")


def _why_no_inference_on_cpu(x: Tensor, *others: Tensor) -> str | None:
    if recorded():
        return "gradients or a graph are being recorded: inference only"
    return _why_not_on_cpu(x, *others)


def _why_not_on_cpu(x: Tensor, *others: Tensor) -> str | None:
    tensors = (x, *others)
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(x.dtype).removeprefix('torch.')} is not supported: float32 and bfloat16 only"
    if not all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in tensors):
        return "a tensor is a subclass or not dense"
    if not all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in tensors):
        return "the tensors are not all on the CPU and of one dtype"
    return "autocast is on, and not for a packed weight in bfloat16" if _autocast.active(x) else None


def plain_on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary dense one on the CPU."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None, residual: Tensor | None
) -> Tensor:
    """All but the weight, whose packed copy may be there in x's dtype, are of x's dtype."""
    weight = _packed.in_products(weight, x.shape[:-1].numel(), x.dtype)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], "none")


def autocast_on_cpu(x: Tensor, *others: Tensor) -> bool:
    """Whether a product of these tensors is inference on the CPU that autocast brings to bfloat16, and a kernel may
    take it: see `linear`."""
    if recorded() or not _autocast.active(x) or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    tensors = (x, *others)
    return (
        all(tensor.dtype in (torch.float32, torch.bfloat16) and plain_on_cpu(tensor) for tensor in tensors)
        and requested_backend("linear") in ("auto", "cpu")
        and torch.backends.mkldnn.enabled
    )


def _goes_low(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `_in_autocast` is for this product. Without autocast that is quickly said."""
    return (
        _autocast.active(x)
        and autocast_on_cpu(x, weight, *(() if bias is None else (bias,)))
        and x.numel() * len(weight) >= _FEWEST_MULTIPLICATIONS
        and _packed.keeps(weight)
        and _works(torch.bfloat16)
    )


def _in_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None, residual: Tensor | None
) -> Tensor:
    """As autocast has it: the product is in bfloat16, and a sum with a residual of float32 in float32."""
    x, bias = x.to(torch.bfloat16), None if bias is None else bias.to(torch.bfloat16)
    within = residual if residual is not None and residual.dtype == x.dtype and plain_on_cpu(residual) else None
    if (copy := _packed.in_int8(weight, x.shape[:-1].numel())) is not None:
        out = _int8.linear(x, copy, bias, activation, within)
    else:
        out = _onednn(x, weight, bias, activation, within)
    return out if residual is within else residual + out


def _check_form(activation: Activation | None, residual: Tensor | None) -> None:
    if activation is not None and residual is not None:
        raise ValueError(
            f"activation: expected None where there is a residual, got {activation!r}: no layer needs both"
        )


def recorded() -> bool:
    """Whether what is called is written down, for gradients, in a graph or by a mode."""
    return torch.is_grad_enabled() or _watched()


def _watched() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or moded()


def _int8_copy(x: Tensor, weight: Tensor, *others: Tensor | None) -> _int8.Int8Weight | None:
    """The weight in int8 where its layer was packed so and this call is for it, in bfloat16 also where oneDNN has no
    such product."""
    if not _packed.any_int8() or x.numel() * len(weight) < _FEWEST_MULTIPLICATIONS:
        return None
    tensors = (tensor for tensor in (weight, *others) if tensor is not None)
    return _packed.in_int8(weight, x.shape[:-1].numel()) if inference_on_cpu(x, *tensors) else None


def _takes_onednn(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    return _why_no_onednn(x, weight, *others) is None and requested_backend("linear") in ("auto", "cpu")


def _why_no_onednn(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    # First what is quickly said: small models are hundreds of Linears that this is not for.
    if not recorded() and x.numel() * len(weight) < _FEWEST_MULTIPLICATIONS:
        return "the product is so small that calling oneDNN takes longer"
    reason = _why_no_inference_on_cpu(x, weight, *(tensor for tensor in others if tensor is not None))
    if reason is None and not (torch.backends.mkldnn.enabled and _works(x.dtype)):
        return f"oneDNN is switched off, or has no such product in {str(x.dtype).removeprefix('torch.')} here"
    return reason


def _trains_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        torch.is_grad_enabled()
        and not _watched()
        and _training_products.worthwhile(x, weight)
        and requested_backend("linear") in ("auto", "cpu")
        and _why_not_on_cpu(x, weight, *(() if bias is None else (bias,))) is None
        and torch.backends.mkldnn.enabled
        and _works(torch.float32)
    )


def training_products() -> _training_products.Products | None:
    """What is the faster in training on this machine, measured if nobody has; None where there is no choice."""
    if not (torch.backends.mkldnn.enabled and _works(torch.float32)):
        return None
    return _training_products.measured()


def _explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Explanation:
    _check_form(activation, residual)
    requested, reason = requested_backend("linear"), _why_no_onednn(x, weight, bias, residual)
    if reason is not None and (_goes_low(x, weight, bias) or _trains_by_onednn(x, weight, bias)):
        reason = None
    reasons = {"cuda": NO_KERNEL, "triton": NO_KERNEL}
    if reason is None and requested in ("auto", "cpu"):
        preferred = "cpu is preferred" if requested == "auto" else "cpu is forced"
        return Explanation("linear", requested, "cpu", {**reasons, "reference": f"can run, but {preferred}"})
    return Explanation(
        "linear", requested, "reference", {**reasons, "cpu": reason or f"can run, but {requested} is forced"}
    )


def _backends() -> tuple[str, ...]:
    return ("cpu", "reference") if _works(torch.float32) else ("reference",)


register_layer("linear", Layer(_explain, _backends))


@cache
@_autocast.off
def _works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators and they compute what they are taken for; x86 from AVX2 on only."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    x, weight, other = (torch.linspace(-1, stop, 96, dtype=torch.float32, device="cpu") for stop in (1.0, 2.0, 3.0))
    x, weight, other = x.view(6, 16), weight.view(6, 16).roll(3, 1), other[:36].view(6, 6)
    x, weight, other = (tensor.to(dtype) for tensor in (x, weight, other))
    bias = other[0].contiguous()
    expected = F.linear(x.float(), weight.float(), bias.float())
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        pairs = [
            (operator(x, weight, bias, "none", [], "none"), expected),
            (operator(x, weight, None, "none", [], "none"), expected - bias.float()),
            (operator(x, weight, bias, "gelu", [], "none"), F.gelu(expected)),
            (operator(x, weight, bias, "relu", [], "none"), F.relu(expected)),
            (operator.binary(x, other, weight, bias, "add"), other.float() + expected),
            (operator(x, torch.ops.mkldnn._reorder_linear_weight(weight, 6), bias, "none", [], "none"), expected),
        ]
    except (AttributeError, TypeError, RuntimeError):  # gone, or called in another way by now
        return False
    step = 1e-5 if dtype == torch.float32 else 1e-2
    return all(torch.allclose(found.float(), truth, rtol=step, atol=step) for found, truth in pairs)
