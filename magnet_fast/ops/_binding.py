"""Registration of an operator with torch: schemas, fake kernels and the autograd function around them.

`torch.library` define + impl + register_fake for the forward and the backward as operators of their own,
and an `autograd.Function` outside of them: compiled graphs then hold one opaque node for each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from magnet_fast.ops import _autocast, _registry
from magnet_fast.ops._observed import batched

_NAMESPACE = "magnet_fast"


def bind(
    operator: str,
    *,
    tensors: Sequence[str],
    settings: Sequence[str],
    outputs: int,
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    differentiable: Sequence[int],
    reference: Callable[..., Any],
    keeps: bool = False,
) -> Callable[..., Any]:
    """Register `magnet_fast::<operator>` and its `_backward`; return a function that runs them.

    Forward `(*tensors, *settings, str backend) -> Tensor` or a tuple of `outputs` tensors. Backward
    `(*grad_outputs, *tensors, *settings, bool[] wanted, str backend) -> Tensor[]`: one gradient for each
    index in `differentiable`, an empty tensor of shape (0,) where `wanted` is false. Missing output
    gradients are None.

    Kernels know one derivative. Where the backward pass is itself to be differentiated (`create_graph`), or gets many
    gradients at once (`is_grads_batched`), it is that of the reference, computed from the inputs.

    With `keeps` the registered forward returns one more tensor, `kept`, which the registered backward takes after its
    tensors: what an implementation has computed anyway and would have to compute again. Its shape and meaning are the
    implementation's own (`_registry.Implementation`). The function that is returned gives the outputs alone.

    Args:
        operator: the operator's name.
        tensors: schema of the tensor arguments, e.g. `"Tensor qkv"`, `"Tensor? pad_qkv"`.
        settings: schema of the others, e.g. `"int num_heads"`.
        outputs: number of results; a result that a call does not have is an empty tensor of shape (0,).
        fake: `(*tensors, *settings) -> ` empty results of the right shape and dtype.
        differentiable: indices into `tensors` of the arguments that get a gradient.
        reference: the operator in plain PyTorch, as `(*tensors, *settings) -> ` the outputs, None for one that a call
            does not have.
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

    @torch.library.impl(name, "default")
    def forward_kernel(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        *inputs, backend = arguments
        with torch.no_grad():
            return _registry.implementation(operator, backend).forward(*inputs)

    @torch.library.impl(f"{name}_backward", "default")
    def backward_kernel(*arguments: Any) -> list[Tensor]:
        *inputs, wanted, backend = arguments
        like = _present(inputs[outputs : outputs + count])
        with torch.no_grad():
            grads = _registry.implementation(operator, backend).backward(*inputs, wanted)
        return [like.new_empty(0) if grad is None else grad for grad in grads]

    @torch.library.register_fake(name)
    def fake_forward(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        *inputs, backend = arguments
        results = fake(*inputs)
        if not keeps:
            return results
        kept = _registry.implementation(operator, backend).kept(*inputs)
        return (*(results if isinstance(results, tuple) else (results,)), kept)

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

    def reference_backward(
        grad_outputs: Sequence[Tensor | None], given: Sequence[Tensor | None], rest: Sequence[Any], wanted: list[bool]
    ) -> list[Tensor | None]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), _autocast.disabled(_present(given)):
            # Views: a tensor that is given twice (keys that are values too) has a gradient for each mention.
            views = [None if tensor is None else tensor.view_as(tensor) for tensor in given]
            results = reference(*views, *rest)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(out, g) for out, g in zip(results, grad_outputs, strict=True) if out is not None and g is not None]
        asked = [views[index] for index, want in zip(differentiable, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                asked,
                [g for _, g in pairs],
                create_graph=create_graph,
                materialize_grads=True,
            )
        )
        return [next(found) if want else None for want in wanted]

    class Bound(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results, kept = split(forward_operator(*arguments))
            ctx.save_for_backward(*arguments[:count], *kept)
            ctx.rest = arguments[count:]
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
            given, (*rest, backend) = ctx.saved_tensors, ctx.rest
            wanted = [ctx.needs_input_grad[index] for index in differentiable]
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or batched(*grad_outputs)):
                found = reference_backward(grad_outputs, given[:count], rest, wanted)
            else:
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

    def call(backend: str, *arguments: Any) -> Any:
        return reference(*arguments) if backend == "reference" else run(*arguments, backend)

    _registry.register_call(operator, call)
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
