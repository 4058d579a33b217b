"""The pixel contrastive loss's Triton kernels; see `_triton_backend` for what they need.

The kernels are imported when they first run: Triton takes long to import.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(features: Tensor, inside: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """The losses and `statistics`. Arguments as the reference's; any strides."""
    from magnet_fast.kernels import _runtime, pixel_contrastive_loss

    with _runtime.on_device(features):
        return pixel_contrastive_loss.forward(features, _bytes(inside), temperature, normalize)


def statistics(features: Tensor, *_: object) -> Tensor:
    """Uninitialised, for what the kernels keep of each pixel."""
    from magnet_fast.kernels import pixel_contrastive_loss

    return pixel_contrastive_loss.statistics(features)


def backward(
    grad_loss: Tensor | None,
    features: Tensor,
    inside: Tensor,
    kept: Tensor,
    temperature: float,
    normalize: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of `features`, None when it is not wanted."""
    from magnet_fast.kernels import _runtime, pixel_contrastive_loss

    if not wanted[0]:
        return [None]
    if grad_loss is None:
        return [torch.zeros_like(features, memory_format=torch.contiguous_format)]
    with _runtime.on_device(features):
        grad_loss = grad_loss.float().contiguous()
        return [pixel_contrastive_loss.backward(grad_loss, features, _bytes(inside), kept, temperature, normalize)]


def _bytes(inside: Tensor) -> Tensor:
    """The interpreter has no loads of bool."""
    return inside.contiguous().view(torch.uint8)
