"""Copies of the multi-scale deformable attention module of Deformable DETR and of Grounding DINO.

Both take the maps' sizes as a tensor, which is read back: once for all layers that get the same tensor.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.fast._replacement import Replacement, class_path, must_run_original, names
from magnet_fast.ops._maps import read_maps


class _DeformableAttention:
    """A copy of Deformable DETR's module, in which everything but the sampling is called as the module that it is."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        sizes = None
        if not must_run_original(self) and fit(reference_points, self.n_levels):
            sizes = sizes_of(input_spatial_shapes, input_level_start_index)
        if sizes is None:
            return super().forward(
                query,
                reference_points,
                input_flatten,
                input_spatial_shapes,
                input_level_start_index,
                input_padding_mask,
            )
        settings = (self.n_heads, self.n_levels, self.n_points)
        return self.output_proj(
            attend(self, query, input_flatten, input_padding_mask, reference_points, sizes, settings)
        )


class _BatchSecondAttention:
    """A copy of Grounding DINO's module, which takes the batch as second dimension unless told otherwise."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        sizes = None
        if not must_run_original(self) and fit(reference_points, self.num_levels):
            sizes = sizes_of(spatial_shapes, level_start_index)
        if sizes is None:
            return super().forward(
                query,
                key,
                value,
                query_pos,
                key_padding_mask,
                reference_points,
                spatial_shapes,
                level_start_index,
                **kwargs,
            )
        value = query if value is None else value
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        settings = (self.num_heads, self.num_levels, self.num_points)
        out = self.output_proj(attend(self, query, value, key_padding_mask, reference_points, sizes, settings))
        return out if self.batch_first else out.transpose(0, 1)


def attend(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    padding: Tensor | None,
    points: Tensor,
    sizes: list[tuple[int, int]],
    settings: tuple[int, int, int],
) -> Tensor:
    """All but the last projection; `settings` are heads, levels and points."""
    heads, levels, samples = settings
    value = module.value_proj(value)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    offsets = module.sampling_offsets(query).unflatten(2, (heads, levels, samples, 2))
    logits = module.attention_weights(query).unflatten(2, (heads, levels, samples))
    if points.dtype != torch.float32 or value.dtype == torch.float64:
        points = points.to(value.dtype)
    points = points.expand(value.shape[0], *points.shape[1:])
    return ops.fused_deformable_attention(value.unflatten(2, (heads, -1)), sizes, points, offsets, logits)


def fit(points: Tensor | None, levels: int) -> bool:
    """Whether there is a point or a box of its own for every level."""
    return isinstance(points, Tensor) and points.dim() == 4 and points.shape[2] == levels and points.shape[3] in (2, 4)


_last: tuple[list[tuple[weakref.ref, int]], list[tuple[int, int]] | None] = ([], None)


def sizes_of(shapes: Tensor | None, starts: Tensor | None) -> list[tuple[int, int]] | None:
    """The maps' sizes as Python ints; None where they cannot be read, or where a map does not begin at the last's end.

    On a GPU reading back waits for all that was computed before. The answer for the two tensors that came last is
    kept, as long as they are there and PyTorch has counted no change of them.
    """
    global _last
    both = (shapes, starts)
    if torch.compiler.is_compiling() or not all(
        isinstance(tensor, Tensor) and not tensor.is_floating_point() for tensor in both
    ):
        return None
    if shapes.dim() != 2 or shapes.shape[1] != 2 or starts.shape != shapes.shape[:1]:
        return None
    if shapes.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    counted = not any(tensor.is_inference() for tensor in both)
    seen, sizes = _last
    if (
        counted
        and seen
        and all(
            ref() is tensor and tensor._version == version for (ref, version), tensor in zip(seen, both, strict=True)
        )
    ):
        return sizes
    maps = read_maps(shapes, starts)
    found = maps.sizes if maps.starts == maps.ends else None
    if counted:
        _last = ([(weakref.ref(tensor), tensor._version) for tensor in both], found)
    return found


_FORMS = {
    "deformable attention": (
        _DeformableAttention,
        "query reference_points input_flatten input_spatial_shapes input_level_start_index input_padding_mask",
        "",
        ("d_model", "n_heads", "n_levels", "n_points"),
    ),
    "deformable attention, batch second": (
        _BatchSecondAttention,
        "query key value query_pos key_padding_mask reference_points spatial_shapes level_start_index",
        "kwargs",
        ("embed_dim", "num_heads", "num_levels", "num_points", "batch_first"),
    ),
}
KINDS = tuple(_FORMS)
_PARTS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def attributes(kind: str) -> tuple[str, ...]:
    return (*_FORMS[kind][3], *_PARTS)


def copied_attention(kind: str, cls: type, remake: tuple) -> Replacement:
    """Of a copy in one of the forms in `KINDS`."""
    form, parameters, optional, numbers = _FORMS[kind]

    def unfit(module: nn.Module) -> str | None:
        width, heads, levels, points = (getattr(module, name) for name in numbers[:4])
        if any(type(number) is not int or number < 1 for number in (width, heads, levels, points)) or width % heads:
            return "its width, heads, levels and points are not whole numbers that go together"
        expected = heads * levels * points
        for name, outputs in (
            ("sampling_offsets", 2 * expected),
            ("attention_weights", expected),
            ("value_proj", width),
        ):
            if getattr(getattr(module, name), "out_features", None) != outputs:
                return f"its {name} does not have {outputs} outputs"
        if getattr(module, "use_4D_normalizer", False):
            return "its offsets are in pixels of the map also where points are boxes (use_4D_normalizer)"
        return None

    return Replacement(
        path=class_path(cls),
        mixin=form,
        operator="fused_deformable_attention",
        parameters={"forward": (names(parameters), names(optional))},
        attributes=attributes(kind),
        bypassed={},
        unfit=unfit,
        name=f"{form.__name__.lstrip('_')}Copy",
        remake=remake,
    )
