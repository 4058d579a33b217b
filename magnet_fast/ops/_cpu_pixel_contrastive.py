"""The pixel contrastive loss's C++ kernels; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import view


def forward(features: Tensor, inside: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """The losses and `statistics`. Arguments as the reference's; any strides."""
    inside = inside.contiguous()
    loss = features.new_empty(features.shape[0], dtype=_result_dtype(features))
    kept = statistics(features)
    _cpu_backend.extension.pixel_contrastive_loss_forward(
        loss=view(loss), statistics=view(kept), **_inputs(features, inside, temperature, normalize)
    )
    return loss, kept


def statistics(features: Tensor, *_: object) -> Tensor:
    """(B, 4, P), uninitialised, for what the kernel keeps of each pixel: csrc/cpu/pixel_contrastive_loss.h."""
    batch, pixels, _ = features.shape
    return features.new_empty((batch, 4, pixels), dtype=_result_dtype(features))


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
    if not wanted[0]:
        return [None]
    grad = features.new_empty(features.shape)
    if grad_loss is None:
        return [grad.zero_()]
    grad_loss, inside = grad_loss.to(_result_dtype(features)).contiguous(), inside.contiguous()
    _cpu_backend.extension.pixel_contrastive_loss_backward(
        grad_loss=view(grad_loss),
        statistics=view(kept),
        grad_features=view(grad),
        **_inputs(features, inside, temperature, normalize),
    )
    return [grad]


def _result_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _inputs(features: Tensor, inside: Tensor, temperature: float, normalize: bool) -> dict[str, object]:
    return {
        "features": view(features),
        "inside": view(inside),
        "temperature": temperature,
        "normalize": normalize,
        "threads": torch.get_num_threads(),
    }
