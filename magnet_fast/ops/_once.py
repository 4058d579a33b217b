"""In inference on a CPU the checks of a call, and the choice of what runs, are made once for each form of arguments.

A small model calls an operator dozens of times, on so little that checking, choosing and PyTorch's dispatcher take
several times as long as the kernel. A second call of the same shapes, strides, dtypes and settings goes to the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from magnet_fast.ops import _registry
from magnet_fast.ops._linear import recorded

Function = TypeVar("Function", bound=Callable[..., Any])

_MOST_FORMS = 1024  # of one operator; more than that is a stream of new shapes


class _Known(NamedTuple):
    """A form of arguments that was checked.

    Attributes:
        implementations: what was there to choose from.
        places: where each of the kernel's tensors stands among the arguments, None for one that is not given; None
            where another backend than `cpu` was chosen.
        settings: what the kernel takes after its tensors.
    """

    implementations: tuple[_registry.Implementation | None, ...]
    places: tuple[int | None, ...] | None
    settings: tuple[Any, ...]


def checked_once(operator: str) -> Callable[[Function], Function]:
    """Decorate an operator's public function, whose results are those of its kernels.

    Wherever a call is recorded (gradients, a graph that is compiled, traced or exported, a mode), under autocast, for
    tensors that are anything but ordinary dense ones on the CPU, and where the choice is not the `cpu` backend, the
    function is called as it is.

    Args:
        operator: its name; its `prepare` is registered, and has the function's parameters.
    """

    def decorate(function: Function) -> Function:
        forms: dict[Any, _Known] = {}

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if recorded() or torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            given = (*args, *kwargs.values())
            described = _described(given)
            if described is None:
                return function(*args, **kwargs)
            form = described, tuple(kwargs), _registry.requested_backend(operator)
            known = forms.get(form)
            if known is None or known.implementations != _registry.implementations(operator):
                if len(forms) >= _MOST_FORMS:
                    forms.clear()
                known = forms[form] = _look(operator, args, kwargs)
            if known.places is None:
                return function(*args, **kwargs)
            tensors = [None if place is None else given[place] for place in known.places]
            return _registry.implementation(operator, "cpu").forward(*tensors, *known.settings)

        return call

    return decorate


def _look(operator: str, args: Sequence[Any], kwargs: dict[str, Any]) -> _Known:
    """Check and choose as the operator does, with its errors."""
    prepare, implementations = _registry.prepare_of(operator), _registry.implementations(operator)
    arguments = prepare(*args, **kwargs)
    if _registry.choose(operator, arguments) != "cpu":
        return _Known(implementations, None, ())
    order = [*list(inspect.signature(prepare).parameters)[: len(args)], *kwargs]  # names as they were given
    names = [
        argument.name
        for argument in getattr(torch.ops.magnet_fast, operator).default._schema.arguments
        if argument.type.kind() == "TensorType" or str(argument.type) == "Optional[Tensor]"
    ]
    places = tuple(order.index(name) if name in order else None for name in names)
    return _Known(implementations, places, tuple(arguments[len(names) :]))


def _described(given: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that checks and choices read of arguments; None where a kernel could not read one as it lies."""
    described = []
    for value in given:
        if type(value) in (Tensor, nn.Parameter):
            if is_legacy_batchedtensor(value) or not value.is_cpu or value.layout != torch.strided or value.is_neg():
                return None
            described.append((value.shape, value.stride(), value.dtype))
        else:
            try:
                described.append(_setting(value))
            except TypeError:
                return None
    return tuple(described)


def _setting(value: Any) -> Any:
    """With its type: True is no number of heads, and 1 is."""
    kind = type(value)
    if kind in (int, float, bool, type(None)):
        return kind, value
    if kind in (list, tuple, torch.Size):
        return tuple(map(_setting, value))
    raise TypeError
