"""What all frameworks share: a class that is replaced, the checks before it, and the class put in its place.

A replaced module keeps its identity, its attributes, parameters and buffers; only its class changes, to a subclass of
the one it had. So the state dict, names, hooks and `isinstance` stay as they were, a copy or a pickle belongs to
itself (a method bound to the instance cannot be pickled, and in a replica of `nn.DataParallel` belongs to the module
that was replicated), FSDP2 may subclass it again, and `torch.compile` sees an ordinary method. The way back is the
class it had.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from magnet_fast.ops._observed import altered, observed, taken_elsewhere


@dataclass(frozen=True, eq=False)
class Replacement:
    """One upstream class and how it runs on a fused operator.

    Attributes:
        path: the upstream class, `package.module.Class`.
        mixin: the methods that go before the upstream class's own; `super()` in them is the original.
        operator: name of the operator in `magnet_fast.ops`.
        parameters: for each upstream method that the mixin stands for or relies on: the parameters it must have, and
            those it may have. Any other means that upstream has changed.
        attributes: dotted names of what the mixin reads from the module.
        bypassed: submodules that are not called any more, by dotted name, and the class, or one of the classes, that
            each must have exactly, when it is replaced and in every call; by path, or the class itself.
        unfit: why a module whose class and attributes are as expected still cannot be replaced, or None; asked again in
            every call, for what its user has set since.
        note: what its user should know of a replaced module, or None.
        name: of the class, where that in `path` is another library's as well.
        remake: for a class that is not known by its path: makes a replaced module anew where a pickle is read.
    """

    path: str
    mixin: type
    operator: str
    parameters: dict[str, tuple[frozenset[str], frozenset[str]]]
    attributes: tuple[str, ...]
    bypassed: dict[str, str | type | tuple[str | type, ...]]
    unfit: Callable[[nn.Module], str | None] = lambda module: None
    note: Callable[[nn.Module], str | None] = lambda module: None
    name: str | None = None
    remake: tuple[Callable[..., nn.Module], tuple] | None = None

    @property
    def fused_name(self) -> str:
        return "Fused" + (self.name or self.path.rpartition(".")[2])

    def why_not(self, module: nn.Module) -> str | None:
        """None when `module`, whose class is `path`, can be replaced, else the reason."""
        if "forward" in vars(module):
            return "its forward was replaced on the module itself"
        for method, (required, optional) in self.parameters.items():
            function = getattr(type(module), method, None)
            if function is None:
                return f"its class has no method {method}: not a version this was written for"
            given = set(inspect.signature(function).parameters) - {"self"}
            if missing := sorted(required - given):
                return f"{method} has no parameter {', '.join(missing)}: not a version this was written for"
            if unknown := sorted(given - required - optional):
                return f"{method} has the unknown parameter {', '.join(unknown)}: not a version this was written for"
        for name in (*self.bypassed, *self.attributes):
            found: Any = module
            for part in name.split("."):
                if not hasattr(found, part):
                    return f"it has no attribute {name}: not a version this was written for"
                found = getattr(found, part)
            expected = _alternatives(self.bypassed.get(name, type(found)))
            if type(found) not in expected and class_path(type(found)) not in expected:
                return f"its {name} is a {class_path(type(found))}, not a {' or '.join(map(path_of, expected))}"
        if altered(module):
            return "a method was replaced, on the module itself or in its class"
        return self.unfit(module)


@cache
def fused_class(replacement: Replacement, upstream: type) -> type:
    """The subclass of `upstream` that a replaced module gets; a pickle finds it as an attribute of this package."""
    attributes = {
        "__module__": __package__,
        "__doc__": replacement.mixin.__doc__,
        "_upstream_class": upstream,
        "_bypassed": tuple(
            (name.split("."), tuple(_class_at(path) for path in _alternatives(paths)))
            for name, paths in replacement.bypassed.items()
        ),
        "_replacement": replacement,
    }
    if replacement.remake is not None:
        attributes["__reduce_ex__"] = _reduced
    return type(replacement.fused_name, (replacement.mixin, upstream), attributes)


def _reduced(self: nn.Module, protocol: int) -> tuple:
    """A pickle or a copy of a replaced module, by its own class and state: no name leads to a class made for it."""
    function, arguments = type(self)._replacement.remake
    return function, arguments, *object.__reduce_ex__(self, max(2, protocol))[2:]


def _alternatives(classes: str | type | tuple[str | type, ...]) -> tuple[str | type, ...]:
    return classes if isinstance(classes, tuple) else (classes,)


def path_of(cls: str | type) -> str:
    return cls if isinstance(cls, str) else class_path(cls)


def _class_at(path: str | type) -> type:
    if isinstance(path, type):
        return path
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def class_path(cls: type) -> str:
    """`package.module.Class`"""
    return f"{cls.__module__}.{cls.__qualname__}"


def upstream_class(module: nn.Module) -> type | None:
    """The class that a replaced module had, None for any other module."""
    return type(module).__dict__.get("_upstream_class")


def must_run_original(module: nn.Module, *bypassed: nn.Module) -> bool:
    """Whether a call has to take the upstream way although its module is replaced: one rule for all families.

    It has to where a graph is taken for use elsewhere (`torch.jit.trace`, `torch.export`, ONNX): that graph must not
    ask for this package. Where something wants to see every module or every function: hooks for all modules, a mode, a
    transform of `torch.func`, forward-mode differentiation. Where a submodule that the fused way does not call has a
    hook to be called, or a `forward` of its own. Where another method of the module was replaced, or one of its
    class. And where something was set on the module since that the fused way does not fit.

    Args:
        module: the replaced one.
        bypassed: what the fused way does not call.
    """
    if taken_elsewhere() or altered(module) or observed(*bypassed):
        return True
    replacement = getattr(type(module), "_replacement", None)
    return replacement is not None and replacement.unfit(module) is not None


def parts_changed(module: nn.Module) -> bool:
    """Whether a submodule that the fused way does not call got another class, or another module its place, since.

    Asked first: what the fused way reads of a part, another class may not have.
    """
    for path, expected in type(module)._bypassed:
        part = module
        for name in path:
            part = getattr(part, name, None)
        if type(part) not in expected:
            return True
    return False


def names(*text: str) -> frozenset[str]:
    """Names separated by spaces."""
    return frozenset(name for part in text for name in part.split())
