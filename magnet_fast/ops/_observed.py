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


def observed(*modules: nn.Module) -> bool:
    """Whether these modules have to be called as modules, in this call: one has a hook, or computes by other methods
    than those that its class was written with, or `watched` says so."""
    if watched():
        return True
    compiling = torch.compiler.is_compiling()  # it would trace the search, and makes a new graph of a new class
    for module in modules:
        held = module.__dict__
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in held
            or "_hf_hook" in held  # Hugging Face's, for offloading
            or (not compiling and ("_call_impl" in held or "_compiled_call_impl" in held or _overridden(module)))
        ):
            return True
    return False


def altered(module: nn.Module) -> bool:
    """Whether methods of a module that is being called were replaced since its class was written: any but `forward`
    on the module itself, which whoever put it there has called already; and any in the class."""
    return not torch.compiler.is_compiling() and _overridden(module)


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


def taken_elsewhere() -> bool:
    """Whether a graph is being taken for use where this package may not be: an export, a trace."""
    # Not `is_exporting()` where there is another way: torch 2.11 says yes in every compiled function.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return (torch.compiler.is_exporting() if flag is None else flag) or torch.jit.is_tracing()


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


def _overridden(module: nn.Module) -> bool:
    try:
        names, written = _methods(type(module))
    except _NotTheAuthors:
        return True
    held = module.__dict__
    for name in names:
        if name in held:
            return True
    for space, name, method in written:  # noqa: SIM110 (a generator takes longer than all of this)
        if space.get(name) is not method:
            return True
    return False


class _NotTheAuthors(Exception):
    """A method in a class is of another package; raised so that the answer is not kept: it may be put back."""


_BELOW = {"mmcv": "mmengine"}


@lru_cache(maxsize=1024)
def _methods(cls: type) -> tuple[tuple[str, ...], tuple[tuple[Any, str, Any], ...]]:
    """Names of the methods that a class and its bases add to `nn.Module`, without `forward`; and where each method
    stands, as it was when first asked. Of PyTorch's own classes `forward` alone: the others compute nothing."""
    names, written = set(), []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if base.__module__.startswith("magnet_fast.fast"):  # the fast forms themselves
            continue
        for name, method in vars(base).items():
            function = getattr(method, "__func__", method)
            helper = isinstance(function, FunctionType) and not hasattr(nn.Module, name)
            if name != "forward" and (not helper or base.__module__.startswith("torch.nn.modules")):
                continue
            if not _of_the_package_of(base, function):
                raise _NotTheAuthors
            names.add(name)
            written.append((vars(base), name, method))
    return tuple(names - {"forward"}), tuple(written)


def _of_the_package_of(cls: type, function: Any) -> bool:
    """Whether the function is of the package that wrote the class, or a decorator around it of PyTorch or of a package
    that this one is built on."""
    root = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
    package = cls.__module__.partition(".")[0]
    return root in ("torch", package, _BELOW.get(package))
