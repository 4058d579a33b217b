"""Whole models under transforms of `torch.func` and other derivatives: accelerated ones do what plain ones do.

Where PyTorch has no such derivative (of its attention on a CPU, of `grid_sample`), both say so in the same words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import magnet_fast
from magnet_fast.models import Text

from . import own, zoo

pytestmark = pytest.mark.slow

Run = Callable[[Callable[..., Any], Tensor], Tensor]


def subject(name: str) -> tuple[nn.Module, Run, Tensor]:
    """A model, how a tensor comes out of it, and an image of one item."""
    if name in own.MODELS:
        text = Text(*(tensor[:1] for tensor in own.text()))
        return own.model(name), lambda model, x: model(x, text).mask, own.values(1, 3, 32, 32).float()
    family = zoo.FAMILIES[name]
    inputs = family.inputs(zoo.EVEN)
    if isinstance(inputs, Tensor):
        return family.model().eval(), lambda model, x: model(x), inputs[:1]
    rest = {key: tensor[:1] for key, tensor in inputs.items() if key != "pixel_values"}
    return (
        family.model().eval(),
        lambda model, x: zoo.flat(model(pixel_values=x, **rest))[0],
        inputs["pixel_values"][:1],
    )


def functional(model: nn.Module, *state: dict[str, Tensor]) -> Callable[..., Any]:
    return lambda *a, **k: functional_call(model, state, a, k)


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}, dict(model.named_buffers())


def some(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    return run(model, x).reshape(-1)[:3]


def of_each_item(model: nn.Module, run: Run, x: Tensor) -> Any:
    parameters, buffers = state(model)
    loss = lambda p, x: run(functional(model, p, buffers), x).sin().sum()  # noqa: E731
    return vmap(grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, 0.5 * x]))


def dual(model: nn.Module, run: Run, x: Tensor) -> Any:
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(run(model, forward_ad.make_dual(x, x.cos()))).tangent


def batched(model: nn.Module, run: Run, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(some(run, model, x), x, torch.eye(3), is_grads_batched=True)


def twice(model: nn.Module, run: Run, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(model, x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)


def penalty(model: nn.Module, run: Run, x: Tensor) -> Any:
    """The norm of a gradient as part of a loss, down to the weights."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(model, x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [*model.parameters()], materialize_grads=True)


def ensemble(model: nn.Module, run: Run, x: Tensor) -> Any:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    stacked = stack_module_state([model, other])
    with torch.no_grad():
        return vmap(lambda p, b, x: run(functional(model, p, b), x), (0, 0, None))(*stacked, x)


WAYS: dict[str, Callable[[nn.Module, Run, Tensor], Any]] = {
    "grad": lambda model, run, x: grad(lambda x: run(model, x).sin().sum())(x),
    "vmap(grad)": of_each_item,
    "vmap": lambda model, run, x: vmap(lambda x: run(model, x))(torch.stack([x, 0.5 * x])),
    "jvp": lambda model, run, x: jvp(lambda x: run(model, x), (x,), (x.cos(),))[1],
    "jacrev": lambda model, run, x: jacrev(lambda x: some(run, model, x))(x),
    "functional_call": lambda model, run, x: run(functional(model, *state(model)), x),
    "forward mode": dual,
    "batched gradients": batched,
    "jacobian": lambda model, run, x: torch.autograd.functional.jacobian(
        lambda x: some(run, model, x), x, vectorize=True
    ),
    "second derivative": twice,
    "gradient penalty": penalty,
    "ensemble": ensemble,
}


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["timm", "torchvision", "Swin", "Deformable DETR", *own.MODELS])
def test_as_the_plain_model(name: str, way: str) -> None:
    model, run, x = subject(name)

    def outcome(model: nn.Module) -> tuple[list[Tensor], str]:
        try:
            return torch.utils._pytree.tree_leaves(WAYS[way](model, run, x)), ""
        except (RuntimeError, NotImplementedError) as error:
            return [], f"{type(error).__name__}: {error}"

    expected, refused = outcome(copy.deepcopy(model))  # functional_call leaves stacked weights where layers are shared
    assert magnet_fast.accelerate(model, pack=True).replaced
    found, ours = outcome(model)
    assert ours == refused
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 5e-6)
