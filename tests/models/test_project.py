"""A Linear and what follows it: one product, unless someone watches or has changed the Linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.models import project as project_module
from magnet_fast.models.project import project


class Adapted(nn.Linear):
    """What an adapter makes of a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80)


@pytest.fixture
def products(monkeypatch) -> list[Tensor]:
    """The inputs of the calls that went past the module."""
    found = []
    linear = project_module.linear
    monkeypatch.setattr(
        project_module, "linear", lambda x, *args, **kwargs: found.append(x) or linear(x, *args, **kwargs)
    )
    return found


@pytest.mark.parametrize("form", ["plain", "gelu", "relu", "residual"])
@pytest.mark.parametrize("gradients", [True, False])
def test_same_as_the_layer(layer: nn.Linear, form: str, gradients: bool, products: list[Tensor]) -> None:
    x, residual = torch.randn(3, 400, 48), torch.randn(3, 400, 80) if form == "residual" else None
    activation = form if form in ("gelu", "relu") else None
    expected = getattr(F, activation)(layer(x)) if activation else layer(x)
    expected = expected if residual is None else expected + residual
    with torch.set_grad_enabled(gradients):
        found = project(layer, x, activation=activation, residual=residual)
    torch.testing.assert_close(found, expected if gradients else expected.detach(), rtol=1e-5, atol=1e-5)
    assert found.requires_grad == gradients and len(products) == (not gradients)


@pytest.mark.parametrize("hook", ["forward", "before", "global", "adapter"])
def test_layer_that_is_watched_or_changed_is_called(layer: nn.Linear, hook: str, products: list[Tensor]) -> None:
    x, seen = torch.randn(400, 48), []
    handle = None
    if hook == "forward":
        handle = layer.register_forward_hook(lambda *args: seen.append(args))
    elif hook == "before":
        handle = layer.register_forward_pre_hook(lambda *args: seen.append(args))
    elif hook == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    else:
        layer.__class__ = Adapted
    try:
        with torch.no_grad():
            found = project(layer, x, activation="relu")
    finally:
        if handle is not None:
            handle.remove()
    expected = F.relu(F.linear(x, layer.weight, layer.bias) + (hook == "adapter"))
    torch.testing.assert_close(found, expected.detach())
    assert not products and len(seen) == (handle is not None)
