"""A Linear layer of inference and what follows it, in one product of oneDNN's.

PyTorch gives float32 products on a CPU to MKL, and to oneDNN, which is part of the same build, those of a convolution
and those in bfloat16. On a processor of AMD's oneDNN is the faster of the two, and what follows a product, GELU, ReLU
or the sum with a residual, it does while the result is still in registers, in bfloat16 before it is rounded. The
operators it has for a Linear are those that PyTorch's own compiler calls; they are not part of PyTorch's public
interface, so they are tried out once before they are used. They read the weights as they lie: nothing is packed
beforehand, so a weight that changes is seen.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _autocast
from ._registry import requested_backend

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

    In inference (no gradients) in float32 or bfloat16 on an x86 CPU that is one call of oneDNN; anywhere else, under
    autocast, in a graph that is being taken, and where :class:`magnet_fast.ops.backend` asks for the reference, it is
    PyTorch's own functions one after the other. Both agree within the rounding of the dtype.

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
    if activation is not None and residual is not None:
        raise ValueError(
            f"activation: expected None where there is a residual, got {activation!r}: no layer needs both"
        )
    if _takes_onednn(x, weight, bias, residual):
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], "none")
    return then(F.linear(x, weight, bias), activation, residual)


def then(out: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
    """What follows a Linear, as PyTorch's own functions."""
    out = _ACTIVATIONS[activation](out)
    return out if residual is None else residual + out


def _takes_onednn(x: Tensor, *others: Tensor | None) -> bool:
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in tensors)
        and all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in tensors)
        and x.numel() * len(tensors[1]) >= _FEWEST_MULTIPLICATIONS
        and not _autocast.active(x)
        and requested_backend("linear") in ("auto", "cpu")
        and torch.backends.mkldnn.enabled
        and _works(x.dtype)
    )


@cache
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
        ]
    except (AttributeError, TypeError, RuntimeError):  # gone, or called in another way by now
        return False
    step = 1e-5 if dtype == torch.float32 else 1e-2
    return all(torch.allclose(found.float(), truth, rtol=step, atol=step) for found, truth in pairs)
