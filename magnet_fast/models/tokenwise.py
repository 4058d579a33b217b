"""Token-wise parts of a model, run slice by slice so that what lies between two layers stays small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# The allocator keeps smaller memory than this for the next result; larger results are fresh pages every time.
_WORTH_SLICING = 16 << 20
_SLICE_BYTES = 4 << 20  # a thread
_FEWEST_ROWS = 512  # matrix products of fewer rows run slower


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
