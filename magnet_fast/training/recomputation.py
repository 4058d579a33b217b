"""Activation checkpointing: what a layer computed is thrown away and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bert.modeling_bert import BertLayer

from magnet_fast.models.pixel_decoder import DeformableLayer
from magnet_fast.models.swin import SwinBlock

LAYERS = (SwinBlock, BertLayer, DeformableLayer)
"""The layers that hold nearly all activations: of the image, of the text and the predictor, of the pixel decoder."""


def recompute_activations(module: nn.Module) -> None:
    """Make the `LAYERS` of a model keep their inputs only; losses and gradients stay what they are, bit for bit.

    Random numbers (dropout, stochastic depth) and autocast are those of the first time. Names of parameters do
    not change. A copy of the module must be made before, not after.
    """
    for layer in module.modules():
        if isinstance(layer, LAYERS):
            layer.forward = _recomputed(layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
