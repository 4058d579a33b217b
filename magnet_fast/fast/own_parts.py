"""What the fast forms of our own models share: products, slices, constants that are kept, gradients that are zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast.models.position import sine_position
from magnet_fast.ops._linear import Activation, linear, plain_linear, small, then
from magnet_fast.ops._observed import moded, observed

# The allocator keeps smaller memory than this for the next result; larger results are fresh pages every time.
_WORTH_SLICING = 16 << 20
_SLICE_BYTES = 4 << 20  # a thread
_FEWEST_ROWS = 512  # matrix products of fewer rows run slower


def project(
    layer: nn.Module, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """`layer(x)`, then the activation, or plus the residual: (..., C) to (..., D).

    While gradients are recorded, and where the layer is anything but an `nn.Linear` without hooks (quantised, adapted,
    sharded, observed), or has little to do, the layer is called as a module.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or small(layer, x)
        or not plain_linear(layer)
        or observed(layer)
    ):
        return then(layer(x), activation, residual)
    return linear(x, layer.weight, layer.bias, activation=activation, residual=residual)


def tokenwise(module: nn.Module, function: Callable[..., Tensor], *tensors: Tensor, width: int) -> Tensor:
    """`function(*tensors)` for a function that treats every token alone: (..., C) tensors to (..., C').

    In inference on a CPU it is called for a few hundred tokens at a time. A feed-forward network of a 480×480 image
    else fills 80 MB a layer, and the first touch of so much fresh memory takes a third of the layer's time. Anywhere
    else, and where all of it is small, it is one call.

    Args:
        module: whose evaluation mode says that the function draws no random numbers.
        tensors: same leading dimensions, (..., C) each.
        width: the most values a token takes between the function's layers.
    """
    first = tensors[0]
    leading = first.shape[:-1]
    if torch.compiler.is_compiling() or module.training or torch.is_grad_enabled() or first.device.type != "cpu":
        return function(*tensors)
    count = leading.numel()
    limit = _SLICE_BYTES * torch.get_num_threads() // (width * first.element_size())
    rows = max(_FEWEST_ROWS, limit)
    if count <= rows or count * width * first.element_size() <= _WORTH_SLICING:
        return function(*tensors)
    flat = [tensor.reshape(count, tensor.shape[-1]) for tensor in tensors]
    out = None
    for start in range(0, count, rows):
        part = function(*(tensor[start : start + rows] for tensor in flat))
        if out is None:
            out = part.new_empty((count, part.shape[-1]))
        out[start : start + rows] = part
    return out.view(*leading, out.shape[-1])


def kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, whose last argument but one is a device, with its last few results kept: not to be written to.

    A result made now is kept only if it serves every later call: it is real (no fake tensor, no transform of
    `torch.func`, no compiler), no captured CUDA graph owns its memory, and it may take part in training.
    """

    @lru_cache(maxsize=16)
    def keep(*arguments: Any) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    def made(*arguments: Any) -> Tensor:
        return (keep if _outlives_call(arguments[-2]) else make)(*arguments)

    made.cache_info = keep.cache_info
    return made


def _outlives_call(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or device.type not in ("cpu", "cuda") or moded():
        return False
    return device.type == "cpu" or not torch.cuda.is_current_stream_capturing()


kept_sine_position = kept(sine_position)


def with_zero_gradients(out: Tensor, *unread: Tensor) -> Tensor:
    """`out`, and in training a gradient of zero for what the plain form computes with to no effect.

    A key's bias, say, shifts all scores of a query alike. Optimisers, and processes that wait for every gradient, then
    find what they find in the plain form.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in unread):
        return _WithZeroGradients.apply(out, *unread)
    return out


class _WithZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *unread: Tensor) -> Tensor:
        ctx.save_for_backward(*unread)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def plain_pointwise(convolution: nn.Module) -> bool:
    """Whether it is a convolution of size 1 and nothing else: `pointwise` then computes the same."""
    return (
        type(convolution) is nn.Conv2d
        and type(convolution.weight) in (nn.Parameter, Tensor)
        and convolution.kernel_size == convolution.stride == convolution.dilation == (1, 1)
        and convolution.padding == (0, 0)
        and convolution.groups == 1
    )


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of size 1 on a channels-last map: (B, H, W, C) → (B, H, W, C')."""
    return linear(x, convolution.weight.flatten(1), convolution.bias)
