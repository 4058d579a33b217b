"""A Linear of a model and what follows it, in one product where nothing watches the Linear itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._linear import Activation, linear, observed, plain_linear, then


def project(
    layer: nn.Module, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """`layer(x)`, then the activation, or plus the residual: (..., C) to (..., D).

    While gradients are recorded, and where the layer is anything but an `nn.Linear` without hooks (quantised, adapted,
    sharded, observed), the layer is called as a module.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not plain_linear(layer) or observed(layer):
        return then(layer(x), activation, residual)
    return linear(x, layer.weight, layer.bias, activation=activation, residual=residual)
