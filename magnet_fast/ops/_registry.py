"""The one place that decides which implementation of an operator runs.

Each operator registers its implementations here, every one with a predicate that says *why not*. The
public functions ask `choose` on every call; `explain` asks the same predicates and prints the
answer.

Where several can run a call on a GPU their order here is a first guess: `_trial` times them.

The choice is plain Python over a thread-local stack, tensor metadata and the predicates: `torch.compile`
traces it, guards on the stack (so a compiled function follows `ops.backend`) and leaves nothing of it in
the graph.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from magnet_fast.ops._observed import taken_elsewhere, transformed

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""What an operator can run on: the reference, plain PyTorch, or kernels; `auto` picks one of them."""

ENVIRONMENT_VARIABLE = "MAGNET_FAST_BACKEND"

NO_KERNEL = "no kernel for this operator yet"
"""Why a backend does not run an operator that it has no implementation of."""

# The fastest first. The reference runs everywhere, so it ends the list; it is no kernel: the operators call it
# themselves, so that it can be differentiated any number of times.
_KERNELS = ("cuda", "triton", "cpu")
PREFERENCE = (*_KERNELS, "reference")


class BackendError(RuntimeError):
    """A forced backend cannot run the call; the message is what `explain` prints."""


class backend:  # noqa: N801 - used as a function: `with ops.backend("cpu"):`
    """Force one backend for the operators called inside the `with` block.

    Blocks nest (the innermost counts), hold for the current thread only, take precedence over the
    environment variable `MAGNET_FAST_BACKEND` and work inside and outside of a compiled function. The
    backward pass uses the backend of its forward. What activation checkpointing recomputes on a GPU runs in
    a thread of autograd's, where only the environment variable holds.

    Args:
        name: `"reference"`, `"cpu"`, `"triton"`, `"cuda"`, or `"auto"` (the fastest that can run).
        *operators: names of the operators that the block is about; none given means all of them. A whole
            model can so run one operator on a backend that has no kernel for the others. `linear` stands for the
            models' Linears: PyTorch computes them wherever the forced backend cannot, without an error.

    Raises:
        ValueError: at construction, for an unknown name. An operator that the forced backend cannot run
            raises a BackendError (a RuntimeError), with the reason, when it is called.
    """

    def __init__(self, name: str, *operators: str) -> None:
        self.name = _known(name, "backend")
        self.operators = tuple(_known_operator(operator) for operator in operators)

    def __enter__(self) -> backend:
        # A new tuple, not a list changed in place: dynamo guards on it and restores it exactly.
        _state.stack = (*_state.stack, (self.name, self.operators))
        return self

    def __exit__(self, *exception: object) -> None:
        _state.stack = _state.stack[:-1]


@dataclass(frozen=True)
class Explanation:
    """What an operator call would run, and why not something else. `str()` of it is meant for people.

    Attributes:
        operator: the operator's name.
        requested: the backend asked for (`auto` when none is forced).
        chosen: the backend that would run, or `"none"` when the forced one cannot.
        reasons: for every other backend, why it would not run.
        measured: on a GPU, where `auto` decides by time: the times of such calls, or that they are not known yet.
    """

    operator: str
    requested: str
    chosen: str
    reasons: dict[str, str] = field(default_factory=dict)
    measured: str = ""

    def __str__(self) -> str:
        if self.chosen == "none":
            head = f"{self.operator}: backend {self.requested!r} is forced and cannot run"
        elif self.requested == "auto":
            head = f"{self.operator}: {self.chosen} would run (the fastest that can)"
        elif self.requested != self.chosen:
            head = f"{self.operator}: {self.chosen} would run (backend {self.requested!r} is forced and cannot)"
        else:
            head = f"{self.operator}: {self.chosen} would run (forced)"
        lines = [head, *(f"  {name}: {reason}" for name, reason in self.reasons.items())]
        return "\n".join([*lines, f"  times: {self.measured}"] if self.measured else lines)

    __repr__ = __str__


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would run, and why each other one would not. Nothing is computed.

    Args:
        operator: an operator's name, e.g. `"window_attention"`.
        *args: exactly what the operator itself would be called with, by position,
        **kwargs: and by name.

    Raises:
        ValueError: for an unknown operator, and whatever the operator raises for these arguments.
    """
    if _known_operator(operator) in _layers:
        return _layers[operator].explain(*args, **kwargs)
    return _explanation(operator, requested_backend(operator), _prepare[operator](*args, **kwargs))


def available_backends(operator: str | None = None) -> tuple[str, ...]:
    """Backends that this process can run, the preferred first: built, importable, with their device present.

    Args:
        operator: only the backends that run this operator; None for those that run any operator whose kernels are
            the library's own.
    """
    if operator is not None and _known_operator(operator) in _layers:
        return _layers[operator].backends()
    names = {name for (op, name), item in _implementations.items() if operator in (None, op) and item.missing is None}
    return tuple(name for name in PREFERENCE if name in names or name == "reference")


# ---- For the operators -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """One operator's kernels on one backend.

    Attributes:
        forward, backward: called by the registered operators with the operator's normalised arguments.
        supports: takes the operator's normalised arguments, returns None or the reason why not.
        missing: why the backend cannot run in this process whatever the arguments, or None.
        kept: for an operator bound with `keeps`, else None: takes the operator's normalised arguments, returns an
            empty tensor like the one that the forward returns after its results and the backward gets after its
            tensors.
        passed_over: takes the operator's normalised arguments, returns None or why `auto` prefers the next
            backend although this one can run them: where another has been measured to be faster. On a GPU it is the
            first guess alone.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[..., str | None]
    missing: str | None = None
    passed_over: Callable[..., str | None] = lambda *arguments: None
    kept: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Layer:
    """What `backend` and `explain` know by name although its calls are not chosen here.

    A layer of PyTorch's own that a kernel takes where it can; wherever it cannot, whatever is forced, PyTorch runs.

    Attributes:
        explain: takes the layer's arguments and returns the Explanation of a call.
        backends: what can run it in this process, the preferred first.
    """

    explain: Callable[..., Explanation]
    backends: Callable[[], tuple[str, ...]]


def register_operator(operator: str, prepare: Callable[..., tuple]) -> None:
    """Make an operator known. `prepare` checks the public arguments and returns the normalised ones."""
    _prepare[operator] = prepare


def register_call(operator: str, call: Callable[..., Any]) -> None:
    """Say how an operator runs on a given backend, the reference too: `call(backend, *normalised arguments)`."""
    _calls[operator] = call


def register_layer(name: str, layer: Layer) -> None:
    """Make a layer known."""
    _layers[name] = layer


def register(
    operator: str,
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    supports: Callable[..., str | None] = lambda *arguments: None,
    missing: str | None = None,
    passed_over: Callable[..., str | None] = lambda *arguments: None,
    kept: Callable[..., Any] | None = None,
) -> None:
    """Add an implementation; see `Implementation`."""
    if name not in _KERNELS:
        raise ValueError(f"name: unknown name {name!r}; expected one of {', '.join(_KERNELS)}")
    _implementations[operator, name] = Implementation(forward, backward, supports, missing, passed_over, kept)


def set_proof(
    unproven: Callable[[str, str, tuple], str | None], expected: Callable[[str, str, tuple], str | None]
) -> None:
    """What `choose`, and `explain`, ask of a backend that can run a call before it is taken: None, or why not to."""
    _proof.unproven, _proof.expected = unproven, expected


def set_trial(
    choice: Callable[[str, tuple], str | None], known: Callable[[str, tuple], tuple[str | None, str]]
) -> None:
    """What `choose`, and `explain`, ask first: the backend by measurement, None for the first guess; and the times."""
    _trial.choice, _trial.known = choice, known


def implementation(operator: str, name: str) -> Implementation:
    """The registered implementation; RuntimeError when there is none."""
    item = _implementations.get((operator, name))
    if item is None:
        raise RuntimeError(f"{operator}: backend {name!r} has no kernel for this operator")
    return item


def implementations(operator: str) -> tuple[Implementation | None, ...]:
    """All that `choose` has to choose from, the preferred first."""
    return tuple([_implementations.get((operator, name)) for name in _KERNELS])


def prepare_of(operator: str) -> Callable[..., tuple]:
    """What `register_operator` was given."""
    return _prepare[operator]


def call_of(operator: str) -> Callable[..., Any]:
    """What `register_call` was given."""
    return _calls[operator]


def choose(operator: str, arguments: tuple) -> str:
    """The backend that runs this call.

    Raises:
        BackendError: a forced backend cannot run these arguments; the message says why.
    """
    requested = requested_backend(operator)
    if requested != "auto":
        if why_not(operator, requested, arguments) is not None:
            raise BackendError(str(_explanation(operator, requested, arguments)))
        return requested
    measured = _trial.choice(operator, arguments)
    return first_guess(operator, arguments) if measured is None else measured


def first_guess(operator: str, arguments: tuple) -> str:
    """What `auto` takes where nothing was measured: the first proven backend that nothing speaks against."""
    for name in _KERNELS:
        if (
            why_not(operator, name, arguments) is None
            and why_passed_over(operator, name, arguments) is None
            and unproven(operator, name, arguments) is None
        ):
            return name
    return "reference"


def why_not(operator: str, name: str, arguments: tuple) -> str | None:
    """None when the backend can run these normalised arguments, else the reason."""
    if name == "reference":
        return None
    item = _implementations.get((operator, name))
    if item is None:
        return NO_KERNEL
    if item.missing is not None:
        return item.missing
    if not torch.compiler.is_compiling() and transformed():
        return "a transform of torch.func or forward-mode differentiation is active: the reference alone knows them"
    return item.supports(*arguments)


def why_passed_over(operator: str, name: str, arguments: tuple) -> str | None:
    """None when `auto` may take the backend for these normalised arguments that it can run, else the reason."""
    if taken_elsewhere():
        return "a graph is being taken for use elsewhere, where this package may not be"
    return None if name == "reference" else _implementations[operator, name].passed_over(*arguments)


def unproven(operator: str, name: str, arguments: tuple) -> str | None:
    """None when the backend's kernels have proved themselves or need not, else why not. May check them."""
    return None if name == "reference" else _proof.unproven(operator, name, arguments)


def doubt(operator: str, name: str, arguments: tuple) -> str | None:
    """`unproven` by what is known: nothing is checked on a GPU."""
    return None if name == "reference" else _proof.expected(operator, name, arguments)


def requested_backend(operator: str) -> str:
    """The name that the innermost `ops.backend` block forces, else the environment's, else `auto`.

    The environment is read at every call; a compiled function keeps what it read when it was traced.
    """
    for name, operators in reversed(_state.stack):
        if not operators or operator in operators:
            return name
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _known(name, f"environment variable {ENVIRONMENT_VARIABLE}") if name else "auto"


def _explanation(operator: str, requested: str, arguments: tuple) -> Explanation:
    chosen, reasons, auto = "none", {}, requested == "auto"
    fastest, times = _trial.known(operator, arguments) if auto else (None, "")
    for name in PREFERENCE:
        reason = why_not(operator, name, arguments)
        if reason is None and auto and fastest is None and (slower := why_passed_over(operator, name, arguments)):
            reason = f"can run, but {slower}"
        if reason is None and auto and (doubtful := doubt(operator, name, arguments)):
            reason = f"can run, but {doubtful}"
        if reason is None and fastest not in (None, name):
            reason = f"can run, but {fastest} was measured to be the better here"
        if reason is not None:
            reasons[name] = reason
        elif requested == name or (auto and chosen == "none"):
            chosen = name
        else:
            reasons[name] = "can run, but " + (f"{chosen} is preferred" if auto else f"{requested} is forced")
    return Explanation(operator, requested, chosen, reasons, times)


def _known(name: str, what: str) -> str:
    if name not in BACKENDS and name != "auto":
        raise ValueError(f"{what}: unknown name {name!r}; expected one of {', '.join((*BACKENDS, 'auto'))}")
    return name


def _known_operator(operator: str) -> str:
    if operator not in _prepare and operator not in _layers:
        known = ", ".join(sorted([*_prepare, *_layers]))
        raise ValueError(f"operator: unknown name {operator!r}; expected one of {known}")
    return operator


class _State(threading.local):
    def __init__(self) -> None:
        self.stack: tuple[tuple[str, tuple[str, ...]], ...] = ()


class _Proof:
    unproven: Callable[[str, str, tuple], str | None] = staticmethod(lambda operator, name, arguments: None)
    expected: Callable[[str, str, tuple], str | None] = staticmethod(lambda operator, name, arguments: None)


class _Trial:
    choice: Callable[[str, tuple], str | None] = staticmethod(lambda operator, arguments: None)
    known: Callable[[str, tuple], tuple[str | None, str]] = staticmethod(lambda operator, arguments: (None, ""))


_proof = _Proof()
_trial = _Trial()
_state = _State()
_prepare: dict[str, Callable[..., tuple]] = {}
_calls: dict[str, Callable[..., Any]] = {}
_layers: dict[str, Layer] = {}
_implementations: dict[tuple[str, str], Implementation] = {}
