"""Weights in a quarter of the bytes, for files: matrices and kernels in int8 by row, each row with a scale.

In memory they are floats again. Our own choice; rounding to int8 by row is that of `accelerate(weights="int8")`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SCALES = "::scales"  # behind a tensor's name; no parameter's name has a colon
_LEAST = 4096  # numbers; smaller tensors stay as they are
_STEPS = 127


def compacted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `expanded` makes the tensors of again, up to half a step of each row.

    Raises:
        ValueError: a tensor that is not finite.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() < _LEAST:
            found[name] = tensor
            continue
        rows = tensor.float().flatten(1)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"compact: expected finite weights, got NaN or infinity in {name}")
        scales = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _STEPS
        found[name] = (rows / scales[:, None]).round().clamp(-_STEPS, _STEPS).to(torch.int8).view(tensor.shape)
        found[name + _SCALES] = scales
    return found


def expanded(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """float32 tensors of what `compacted` wrote; those that it left as they were stay.

    Args:
        what: they are called, in errors.

    Raises:
        ValueError: scales without their weights, or not one for each row.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALES)}
    for name, scales in tensors.items():
        if not name.endswith(_SCALES):
            continue
        name = name.removesuffix(_SCALES)
        weights = found.get(name)
        if weights is None or weights.dtype != torch.int8 or weights.dim() < 2 or scales.shape != weights.shape[:1]:
            raise ValueError(f"{what}: expected int8 rows of {name} and a scale for each; the file is damaged")
        found[name] = weights.float() * scales.float().view(-1, *[1] * (weights.dim() - 1))
    return found
