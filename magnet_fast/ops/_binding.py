"""Registration of an operator with torch: schemas, fake kernels and the autograd function around them.

``torch.library`` define + impl + register_fake for the forward and the backward as operators of their own,
and an ``autograd.Function`` outside of them: compiled graphs then hold one opaque node for each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import _registry

_NAMESPACE = "magnet_fast"
_CONTIGUOUS = torch.contiguous_format


def bind(
    operator: str,
    *,
    tensors: Sequence[str],
    settings: Sequence[str],
    outputs: int,
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    differentiable: Sequence[int],
    keeps: bool = False,
) -> Callable[..., Any]:
    """Register ``magnet_fast::<operator>`` and its ``_backward``; return a function that runs them.

    Forward ``(*tensors, *settings, str backend) -> Tensor`` or a tuple of ``outputs`` tensors. Backward
    ``(*grad_outputs, *tensors, *settings, bool[] wanted, str backend) -> Tensor[]``: one gradient for each
    index in ``differentiable``, an empty tensor of shape (0,) where ``wanted`` is false. Missing output
    gradients are None.

    With ``keeps`` the registered forward returns one more tensor, ``kept``, which the registered backward
    takes after its tensors: what an implementation has computed anyway and would have to compute again. Its
    shape and meaning are the implementation's own (:class:`._registry.Implementation`), (0,) where it keeps
    nothing. The function that is returned gives the outputs alone.

    Args:
        operator: the operator's name.
        tensors: schema of the tensor arguments, e.g. ``"Tensor qkv"``, ``"Tensor? pad_qkv"``.
        settings: schema of the others, e.g. ``"int num_heads"``.
        outputs: number of results; a result that a call does not have is an empty tensor of shape (0,).
        fake: ``(*tensors, *settings) -> `` empty results of the right shape and dtype.
        differentiable: indices into ``tensors`` of the arguments that get a gradient.
        keeps: whether the forward can keep a tensor for the backward.
    """
    name, count = f"{_NAMESPACE}::{operator}", len(tensors)
    inputs = ", ".join([*tensors, *settings])
    grads = ", ".join(f"Tensor? grad_output{i}" for i in range(outputs))
    results = outputs + keeps
    result = "Tensor" if results == 1 else "(" + ", ".join(["Tensor"] * results) + ")"
    given = ", ".join([*tensors, *(["Tensor kept"] if keeps else []), *settings])

    torch.library.define(name, f"({inputs}, str backend) -> {result}")
    torch.library.define(f"{name}_backward", f"({grads}, {given}, bool[] wanted, str backend) -> Tensor[]")

    def with_kept(results: Tensor | tuple[Tensor, ...], found: _registry.Implementation, inputs: list) -> tuple:
        kept = _present(inputs[:count]).new_empty(0) if found.kept is None else found.kept(*inputs)
        return (*(results if isinstance(results, tuple) else (results,)), kept)

    @torch.library.impl(name, "default")
    def forward_kernel(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        *inputs, backend = arguments
        found = _registry.implementation(operator, backend)
        with torch.no_grad():
            results = found.forward(*inputs)
        return with_kept(results, found, inputs) if keeps and found.kept is None else results

    @torch.library.impl(f"{name}_backward", "default")
    def backward_kernel(*arguments: Any) -> list[Tensor]:
        *inputs, wanted, backend = arguments
        found = _registry.implementation(operator, backend)
        like = _present(inputs[outputs : outputs + count])
        if keeps and found.kept is None:
            del inputs[outputs + count]
        with torch.no_grad():
            grads = found.backward(*inputs, wanted)
        return [like.new_empty(0) if grad is None else grad for grad in grads]

    @torch.library.register_fake(name)
    def fake_forward(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        *inputs, backend = arguments
        results = fake(*inputs)
        return with_kept(results, _registry.implementation(operator, backend), inputs) if keeps else results

    @torch.library.register_fake(f"{name}_backward")
    def fake_backward(*arguments: Any) -> list[Tensor]:
        *inputs, wanted, _ = arguments
        given = inputs[outputs : outputs + count]
        like = _present(given)
        return [
            given[index].new_empty(given[index].shape) if want else like.new_empty(0)
            for index, want in zip(differentiable, wanted, strict=True)
        ]

    forward_operator = getattr(getattr(torch.ops, _NAMESPACE), operator).default
    backward_operator = getattr(getattr(torch.ops, _NAMESPACE), f"{operator}_backward").default

    def split(found: Tensor | tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        """The operator's outputs, and what it keeps."""
        if not keeps:
            return found, ()
        return found[0] if outputs == 1 else found[:-1], found[-1:]

    class Bound(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results, kept = split(forward_operator(*arguments))
            ctx.save_for_backward(*arguments[:count], *kept)
            ctx.rest = arguments[count:]
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
            given, (*rest, backend) = ctx.saved_tensors, ctx.rest
            wanted = [ctx.needs_input_grad[index] for index in differentiable]
            found = backward_operator(*grad_outputs, *given, *rest, wanted, backend)
            grads: list[Tensor | None] = [None] * (count + len(ctx.rest))
            for index, want, grad in zip(differentiable, wanted, found, strict=True):
                if want:
                    grads[index] = grad
            return tuple(grads)

    Bound.__name__ = Bound.__qualname__ = operator

    def run(*arguments: Any) -> Any:
        needs_grad = any(arguments[i] is not None and arguments[i].requires_grad for i in differentiable)
        if needs_grad and torch.is_grad_enabled():
            return Bound.apply(*(_distinct(arguments) if torch.compiler.is_compiling() else arguments))
        return split(forward_operator(*arguments))[0]

    return run


def _distinct(arguments: Sequence[Any]) -> list[Any]:
    """The arguments with a view in place of a tensor's second mention (keys that are values too).

    Dynamo does not trace an autograd function that is given one tensor twice.
    """
    seen: list[Tensor] = []
    distinct = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if any(argument is other for other in seen):
                argument = argument.view_as(argument)
            else:
                seen.append(argument)
        distinct.append(argument)
    return distinct


def _present(tensors: Sequence[Tensor | None]) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)


def recomputed_backward(
    reference: Callable[..., Any], outputs: int, differentiable: Sequence[int]
) -> Callable[..., Any]:
    """The reference as a backward kernel: run it again, and differentiate that."""

    def backward(*arguments: Any) -> list[Tensor | None]:
        grad_outputs, inputs, wanted = arguments[:outputs], list(arguments[outputs:-1]), arguments[-1]
        chosen = [index for index, want in zip(differentiable, wanted, strict=True) if want]
        given = [index for index, grad in enumerate(grad_outputs) if grad is not None]
        if not chosen or not given:
            zeros = {index: torch.zeros_like(inputs[index], memory_format=_CONTIGUOUS) for index in chosen}
            return [zeros.get(index) for index in differentiable]

        def differentiate() -> tuple[Tensor | None, ...]:
            for index in chosen:
                inputs[index] = inputs[index].detach().requires_grad_()
            results = reference(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            leaves = [inputs[index] for index in chosen]
            used = [i for i in given if results[i].requires_grad]
            if not used:
                return (None,) * len(leaves)
            return torch.autograd.grad(
                [results[i] for i in used], leaves, [grad_outputs[i] for i in used], allow_unused=True
            )

        grads = _with_autograd(differentiate, inputs[chosen[0]].device)
        found = {
            index: torch.zeros_like(inputs[index], memory_format=_CONTIGUOUS) if grad is None else grad.contiguous()
            for index, grad in zip(chosen, grads, strict=True)
        }
        return [found.get(index) for index in differentiable]

    return backward


def _with_autograd(function: Callable[[], Any], device: torch.device) -> Any:
    """Call ``function`` in a thread of its own, on the caller's stream.

    A compiled graph runs its operators with autograd switched off underneath, and enable_grad does not undo
    that; a new thread starts with it on.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_on_stream, function, stream).result()


def _on_stream(function: Callable[[], Any], stream: torch.cuda.Stream | None) -> Any:
    with torch.cuda.stream(stream):  # None: does nothing
        return function()
