"""Activation checkpointing: what a layer computed is thrown away and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(layers: Iterable[nn.Module]) -> None:
    """Make layers keep their inputs only; losses and gradients stay what they are, bit for bit.

    Random numbers (dropout, stochastic depth) and autocast are those of the first time. Names of parameters do not
    change. A copy of the model must be made before, not after.

    Args:
        layers: those that hold nearly all activations, as `repeated_layers` of a model or a term tells them.
    """
    for layer in layers:
        layer.forward = _recomputed(layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
