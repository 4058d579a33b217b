"""Tensors that a class makes by itself and the operators take for granted: whether they still are as they were made."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

_looked_at: WeakKeyDictionary[nn.Module, dict[str, tuple[ref[Tensor], tuple, bool]]] = WeakKeyDictionary()


def as_made(module: nn.Module, name: str, key: Hashable, make: Callable[[], Tensor]) -> bool:
    """Whether a tensor of a module has the values that `make` gives for `key`, in whatever shape.

    Many are in the state dict, so that loading may change them, and any may be put in its place. The values are read
    once, and again where PyTorch has counted a change; in a graph that is being taken they cannot be, and pass.
    """
    tensor = held(module, name)
    if torch.compiler.is_compiling() or tensor.is_meta:
        return True
    counted = None if tensor.is_inference() else (tensor._version, key)
    answers = _looked_at.setdefault(module, {})
    if counted is not None and (seen := answers.get(name)) and seen[0]() is tensor and seen[1] == counted:
        return seen[2]
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    expected = make()
    fits = tensor.numel() == expected.numel() and torch.equal(tensor.detach().cpu().flatten(), expected.flatten())
    if counted is not None:
        answers[name] = ref(tensor), counted, fits
    return fits


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as it is: while torch.fx takes a graph, the attribute is a stand-in without a shape."""
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name]
    return getattr(module, name)


def own_index(module: nn.Module, window_size: tuple[int, int]) -> bool:
    """Whether a module's `relative_position_index` is that of Swin v1 for its window."""
    return as_made(module, "relative_position_index", window_size, lambda: swin_index(window_size))


@lru_cache(maxsize=16)
def swin_index(window_size: tuple[int, int]) -> Tensor:
    """(N, N), where the bias of two tokens stands in the table."""
    height, width = window_size
    sides = (torch.arange(side, device="cpu") for side in window_size)
    rows, columns = (x.flatten() for x in torch.meshgrid(*sides, indexing="ij"))
    return (rows[:, None] - rows + height - 1) * (2 * width - 1) + columns[:, None] - columns + width - 1
