"""Who looks on from outside, or has changed how a module computes: asked in every call that would pass modules by.

Hooks, a `forward` put on one module or on a class, modes that see every function, transforms: whoever set them expects
the modules and the functions that the model was written with.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_CALLED = ("forward", "_call_impl", "_compiled_call_impl", "_hf_hook")  # the last is Hugging Face's, for offloading


def observed(*modules: nn.Module) -> bool:
    """Whether these modules have to be called as modules, in this call: one has a hook, or computes by other methods
    than those that its class was written with, or `watched` says so."""
    if watched():
        return True
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            or "_hf_hook" in module.__dict__
            or _overridden(module, _CALLED)
        ):
            return True
    return False


def altered(module: nn.Module) -> bool:
    """Whether methods of a module that is being called were replaced since its class was written: any but `forward`
    on the module itself, which whoever put it there has called already; and any in the class."""
    return _overridden(module, ())


def watched() -> bool:
    """Whether something around wants to see every module or every function of PyTorch's: a hook for all modules, a
    mode (a counter of operations, fake tensors), a transform of `torch.func`."""
    if (
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    ):
        return True
    return not torch.compiler.is_compiling() and moded()  # a compiler traces in a mode of its own


def moded() -> bool:
    """Whether a mode or a transform is active."""
    if torch._C._len_torch_dispatch_stack() > 0 or transformed():
        return True
    if torch._C._len_torch_function_stack() == 0:
        return False
    # A default device is such a mode, too, and changes nothing about a module.
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def transformed() -> bool:
    """Whether a transform of `torch.func` (`vmap`, `grad`, `jvp`) or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def batched(*tensors: Tensor | None) -> bool:
    """Whether some stand for many tensors at once, which a kernel cannot read: those of `is_grads_batched`, too."""
    return transformed() or any(
        tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors
    )


def _overridden(module: nn.Module, more: tuple[str, ...]) -> bool:
    if torch.compiler.is_compiling():  # a compiler would trace the search; it makes a new graph of a new class
        return False
    held = module.__dict__
    try:
        names, written = _methods(type(module))
    except _NotTheAuthors:
        return True
    if not held.keys().isdisjoint(names) or not held.keys().isdisjoint(more):
        return True
    return any(space.get(name) is not method for space, name, method in written)


class _NotTheAuthors(Exception):
    """A method in a class is of another package; raised so that the answer is not kept: it may be put back."""


@lru_cache(maxsize=1024)
def _methods(cls: type) -> tuple[tuple[str, ...], tuple[tuple[Any, str, Any], ...]]:
    """Names of the methods that a class and its bases add to `nn.Module`, without `forward`; and where each method
    stands, as it was when first asked."""
    names, written = set(), []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "_upstream_class" in vars(base):  # made here, of no methods of its own but what a base wraps
            continue
        for name, method in vars(base).items():
            function = getattr(method, "__func__", method)
            if name != "forward" and (not isinstance(function, FunctionType) or hasattr(nn.Module, name)):
                continue
            if not _of_the_package_of(base, function):
                raise _NotTheAuthors
            names.add(name)
            written.append((vars(base), name, method))
    return tuple(names - {"forward"}), tuple(written)


def _of_the_package_of(cls: type, function: Any) -> bool:
    """Whether the function is of the package that wrote the class, or one of PyTorch's decorators around it."""
    root = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
    return root in ("torch", cls.__module__.partition(".")[0])
