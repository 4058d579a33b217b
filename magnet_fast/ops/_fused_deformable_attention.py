"""Multi-scale deformable attention from the raw outputs of its two Linears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
from magnet_fast.ops._deformable_attention import deformable_attention_reference, flat_sizes
from magnet_fast.ops._once import checked_once

_NAME = "fused_deformable_attention"


@checked_once(_NAME)
def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`deformable_attention` with the softmax and the location arithmetic inside.

    Args:
        value: (B, S, h, d), the L maps flattened row by row and put one after the other; S is the sum of H * W.
        spatial_shapes: the (H, W) of each map, Python ints in the order of `value`.
        reference_points: where each query looks from, as (x, y) in [0, 1]: (Q, 2), (B, Q, 2) or (B, Q, L, 2).
            With 4 in the place of 2: boxes (x, y, width, height) around their centre (x, y).
        sampling_offsets: (B, Q, h, L, K, 2) as (x, y): point = reference + offset / (W, H) of its map, or with
            boxes centre + offset / K * (width, height) / 2.
        attention_logits: (B, Q, h, L, K); their softmax over L and K together weights the points.
            Offsets and logits may be views of one wider tensor: what belongs to one head is contiguous, else
            it is copied.

    Returns:
        (B, Q, h * d), dtype of `value` (float32, bfloat16, float16 or float64). Beside a bfloat16 or
        float16 `value` the others may be float32, each for itself. Softmax, locations, samples and sums are
        float32 in low precision. Under autocast `value` is cast to autocast's dtype, of the others only
        what is in another low precision.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message names it.
        RuntimeError: a forced backend cannot run this; the message says why.

    Source: Zhu et al., "Deformable DETR" (arXiv 2010.04159), section 4.1 and, for boxes, appendix A.4; as the
    modules called MSDeformAttn compute it.
    """
    arguments = _prepare(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    backend = _registry.choose(_NAME, arguments)
    with _autocast.disabled(value):
        if backend == "reference":
            return fused_deformable_attention_reference(*arguments)
        return _run(*arguments, backend)


def fused_deformable_attention_reference(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """The operator in plain differentiable PyTorch; `sizes` is the flat list H0, W0, H1, W1, ..."""
    batch, queries, heads, levels, points, _ = sampling_offsets.shape
    computed = torch.float64 if value.dtype == torch.float64 else torch.float32
    weights = attention_logits.to(computed).flatten(3).softmax(-1).view(batch, queries, heads, levels, points)

    reference = reference_points.to(computed)
    reference = reference if reference.dim() > 2 else reference[None]
    reference = reference if reference.dim() > 3 else reference[:, :, None]  # (1 or B, Q, 1 or L, 2 or 4)
    if reference.shape[-1] == 4:
        unit = reference[..., 2:] * (0.5 / points)
    else:
        sides = torch.tensor(sizes, dtype=computed, device=value.device).view(levels, 2)
        unit = sides.flip(-1).reciprocal().view(1, 1, levels, 2)

    # Everything is spelled out along one last dimension: broadcasting over an inner dimension of 2 is slow on a CPU.
    def spread(x: Tensor) -> Tensor:
        x = x[:, :, None, :, None].expand(-1, -1, heads, levels, points, -1)
        return x.reshape(*x.shape[:2], heads * levels * points * 2)

    offsets = sampling_offsets.to(computed).flatten(2)
    locations = torch.addcmul(spread(reference[..., :2]), offsets, spread(unit)).view(sampling_offsets.shape)
    return deformable_attention_reference(value, locations, weights, sizes)


def _prepare(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> tuple:
    """Check the public arguments and return those of `fused_deformable_attention_reference`."""
    _checks.floating_tensor(value, "value", 4, "(B, S, h, d)")
    _checks.floating_tensor(sampling_offsets, "sampling_offsets", 6, "(B, Q, h, L, K, 2)")
    _checks.floating_tensor(attention_logits, "attention_logits", 5, "(B, Q, h, L, K)")
    sizes = flat_sizes(spatial_shapes, value)
    batch, _, heads, _ = value.shape
    queries, levels, points = sampling_offsets.shape[1], len(spatial_shapes), sampling_offsets.shape[4]
    because = f"batch and heads of value, {levels} levels"
    _checks.exact_shape(sampling_offsets, "sampling_offsets", (batch, queries, heads, levels, points, 2), because)
    expected = (batch, queries, heads, levels, points)
    _checks.exact_shape(attention_logits, "attention_logits", expected, "as sampling_offsets")
    _check_reference(reference_points, batch, queries, levels)
    others = {
        "reference_points": reference_points,
        "sampling_offsets": sampling_offsets,
        "attention_logits": attention_logits,
    }
    for name, tensor in others.items():
        _checks.same_device(tensor, name, value, "value")

    value = _autocast.cast(value)
    others = {name: _autocast.cast_low(tensor) for name, tensor in others.items()}
    for name, tensor in others.items():
        _checks.same_dtype(tensor, name, value, "value", or_float32=True)
    return value, *others.values(), sizes


def _check_reference(reference: Tensor, batch: int, queries: int, levels: int) -> None:
    shapes = {2: "(Q, 2)", 3: "(B, Q, 2)", 4: "(B, Q, L, 2)"}
    dimensions = reference.dim() if isinstance(reference, Tensor) and reference.dim() in shapes else 3
    _checks.floating_tensor(reference, "reference_points", dimensions, f"{shapes[dimensions]}, or 4 for 2")
    coordinates = 4 if reference.shape[-1] == 4 else 2
    expected = {2: (queries,), 3: (batch, queries), 4: (batch, queries, levels)}[dimensions]
    because = "queries of sampling_offsets, (x, y) or 4 numbers of a box"
    _checks.exact_shape(reference, "reference_points", (*expected, coordinates), because)


_DIFFERENTIABLE = (0, 1, 2, 3)

_run = bind(
    _NAME,
    tensors=("Tensor value", "Tensor reference_points", "Tensor sampling_offsets", "Tensor attention_logits"),
    settings=("SymInt[] sizes",),
    outputs=1,
    fake=lambda value, reference, offsets, logits, sizes: value.new_empty(
        (value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])
    ),
    differentiable=_DIFFERENTIABLE,
    reference=fused_deformable_attention_reference,
)

_registry.register_operator(_NAME, _prepare)
_registry.register(
    _NAME,
    "cpu",
    _cpu_deformable.fused_forward,
    _cpu_deformable.fused_backward,
    _cpu_backend.supports,
    _cpu_backend.missing,
    _cpu_deformable.passed_over,
)
_registry.register(
    _NAME,
    "triton",
    _triton_deformable.fused_forward,
    _triton_deformable.fused_backward,
    _triton_deformable.supports,
    _triton_backend.missing,
    _triton_backend.passed_over,
)
_registry.register(
    _NAME,
    "cuda",
    _cuda_deformable.fused_forward,
    _cuda_deformable.fused_backward,
    _cuda_deformable.supports,
    _cuda_backend.missing,
    _cuda_backend.passed_over,
)
