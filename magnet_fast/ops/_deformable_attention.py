"""Multi-scale deformable attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast.ops import (
    _autocast,
    _checks,
    _cpu_backend,
    _cpu_deformable,
    _cuda_backend,
    _cuda_deformable,
    _registry,
    _triton_backend,
    _triton_deformable,
)
from magnet_fast.ops._binding import bind
from magnet_fast.ops._once import checked_once

_NAME = "deformable_attention"


@checked_once(_NAME)
def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Every query reads K points on each of L feature maps, bilinearly, and sums them with its weights.

    Args:
        value: (B, S, h, d), the L maps flattened row by row and put one after the other; S is the sum of H * W.
        spatial_shapes: the (H, W) of each map, Python ints in the order of `value`.
        sampling_locations: (B, Q, h, L, K, 2), points as (x, y): 0 is the left or upper edge of a map, 1
            the right or lower (`align_corners=False`). What lies outside reads as zero. May be float32
            beside a bfloat16 or float16 `value`: 8 bits do not place a point on a map of 60 columns.
        attention_weights: (B, Q, h, L, K), already normalised (this operator does not care).

    Returns:
        (B, Q, h * d), dtype of `value` (float32, bfloat16, float16 or float64). Low precisions are
        sampled and summed in float32. Under autocast `value` and `attention_weights` are cast to
        autocast's dtype, the locations stay in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message names it.
        RuntimeError: a forced backend cannot run this; the message says why.

    Source: Zhu et al., "Deformable DETR" (arXiv 2010.04159), section 4.1. On a GPU the reference's
    gradient of `value` is summed by `grid_sample` with atomics: it is the one result of the operators
    that may differ in the last bits from run to run.
    """
    arguments = _prepare(value, spatial_shapes, sampling_locations, attention_weights)
    backend = _registry.choose(_NAME, arguments)
    with _autocast.disabled(value):
        if backend == "reference":
            return deformable_attention_reference(*arguments)
        return _run(*arguments, backend)


def deformable_attention_reference(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, sizes: Sequence[int]
) -> Tensor:
    """The operator in plain differentiable PyTorch; `sizes` is the flat list H0, W0, H1, W1, ..."""
    batch, _, heads, d = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    computed = torch.float64 if value.dtype == torch.float64 else torch.float32

    # (B, Q, h, L, K, 2) -> (L, B*h, Q, K, 2), from [0, 1] to grid_sample's [-1, 1].
    grids = (2.0 * sampling_locations.to(computed) - 1.0).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    weights = (
        attention_weights.to(computed).permute(3, 0, 2, 1, 4).reshape(len(shapes), batch * heads, 1, queries, points)
    )
    maps = value.to(computed).permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], -1)

    # Level by level: the samples of one level are weighted and summed before the next level is read.
    out = None
    for (height, width), level, grid, weight in zip(shapes, maps, grids.unbind(0), weights.unbind(0), strict=True):
        samples = F.grid_sample(
            level.unflatten(-1, (height, width)),
            grid,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (B*h, d, Q, K)
        part = (samples * weight).sum(-1)
        out = part if out is None else out + part
    return out.view(batch, heads * d, queries).transpose(1, 2).contiguous().to(value.dtype)


def _prepare(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple:
    """Check the public arguments and return those of `deformable_attention_reference`."""
    _checks.floating_tensor(value, "value", 4, "(B, S, h, d)")
    _checks.floating_tensor(sampling_locations, "sampling_locations", 6, "(B, Q, h, L, K, 2)")
    _checks.floating_tensor(attention_weights, "attention_weights", 5, "(B, Q, h, L, K)")
    sizes = flat_sizes(spatial_shapes, value)
    batch, _, heads, _ = value.shape
    queries, levels, points = sampling_locations.shape[1], len(spatial_shapes), sampling_locations.shape[4]
    because = f"batch and heads of value, {levels} levels"
    _checks.exact_shape(sampling_locations, "sampling_locations", (batch, queries, heads, levels, points, 2), because)
    _checks.exact_shape(
        attention_weights,
        "attention_weights",
        (batch, queries, heads, levels, points),
        "as sampling_locations",
    )
    for name, tensor in (
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        _checks.same_device(tensor, name, value, "value")

    if _autocast.active(value) and sampling_locations.dtype != torch.float64:
        sampling_locations = sampling_locations.float()
    value, attention_weights = _autocast.cast(value), _autocast.cast(attention_weights)
    _checks.same_dtype(sampling_locations, "sampling_locations", value, "value", or_float32=True)
    _checks.same_dtype(attention_weights, "attention_weights", value, "value")
    return value, sampling_locations, attention_weights, sizes


def flat_sizes(spatial_shapes: Sequence[tuple[int, int]], value: Tensor) -> list[int]:
    """H0, W0, H1, W1, ... of the maps, checked against the positions of `value`."""
    if isinstance(spatial_shapes, Tensor) or not isinstance(spatial_shapes, Sequence):
        raise TypeError(
            "spatial_shapes: expected a list of (H, W) pairs of Python ints (a tensor is not read back), "
            f"got {type(spatial_shapes).__name__}"
        )
    sizes = []
    for index, shape in enumerate(spatial_shapes):
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"spatial_shapes[{index}]: expected a pair (H, W) of ints, got {type(shape).__name__}")
        sizes.extend(_checks.int_pair(shape, f"spatial_shapes[{index}]", 1))
    total = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    if total != value.shape[1]:
        raise ValueError(f"spatial_shapes: the maps have {total} positions together, value has {value.shape[1]}")
    return sizes


_DIFFERENTIABLE = (0, 1, 2)

_run = bind(
    _NAME,
    tensors=("Tensor value", "Tensor sampling_locations", "Tensor attention_weights"),
    settings=("SymInt[] sizes",),
    outputs=1,
    fake=lambda value, locations, weights, sizes: value.new_empty(
        (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    ),
    differentiable=_DIFFERENTIABLE,
    reference=deformable_attention_reference,
)

_registry.register_operator(_NAME, _prepare)
_registry.register(
    _NAME,
    "cpu",
    _cpu_deformable.forward,
    _cpu_deformable.backward,
    _cpu_backend.supports,
    _cpu_backend.missing,
    _cpu_deformable.passed_over,
)
_registry.register(
    _NAME,
    "triton",
    _triton_deformable.forward,
    _triton_deformable.backward,
    _triton_deformable.supports,
    _triton_backend.missing,
    _triton_backend.passed_over,
)
_registry.register(
    _NAME,
    "cuda",
    _cuda_deformable.forward,
    _cuda_deformable.backward,
    _cuda_deformable.supports,
    _cuda_backend.missing,
    _cuda_backend.passed_over,
)
