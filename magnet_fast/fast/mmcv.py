"""mmcv's multi-scale deformable attention, which mmdet's and mmsegmentation's transformers are made of.

On a CPU mmcv itself samples by `grid_sample`, level by level; on a GPU by its compiled extension, which need not be
there (`magnet_fast.compat`) for a module that is replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from magnet_fast.fast._copied_deformable import attend, fit, sizes_of
from magnet_fast.fast._replacement import Replacement, must_run_original, names


class _DeformableAttention:
    """The sum of `identity` and the dropout of the result is inside; the batch is the second dimension, unless told."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        sizes = None
        if "residual" in kwargs:  # the former name of `identity`, which mmcv's decorator knows
            kwargs |= {} if identity is None else {"identity": identity}
        else:
            kwargs["identity"] = identity
            if not must_run_original(self) and fit(reference_points, self.num_levels):
                sizes = sizes_of(spatial_shapes, level_start_index)
        if sizes is None:
            return super().forward(
                query,
                key,
                value,
                query_pos=query_pos,
                key_padding_mask=key_padding_mask,
                reference_points=reference_points,
                spatial_shapes=spatial_shapes,
                level_start_index=level_start_index,
                **kwargs,
            )
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        settings = (self.num_heads, self.num_levels, self.num_points)
        out = self.output_proj(attend(self, query, value, key_padding_mask, reference_points, sizes, settings))
        return self.dropout(out if self.batch_first else out.transpose(0, 1)) + identity


def _unfit(module: nn.Module) -> str | None:
    expected = module.num_heads * module.num_levels * module.num_points
    for name, outputs in (("sampling_offsets", 2 * expected), ("attention_weights", expected)):
        if getattr(getattr(module, name), "out_features", None) != outputs:
            return f"its {name} does not have {outputs} outputs: heads x levels x points"
    if getattr(module.value_proj, "out_features", 1) % module.num_heads:
        return f"the width of its values is no multiple of {module.num_heads} heads"
    return None


REPLACEMENTS = (
    Replacement(
        path="mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention",
        mixin=_DeformableAttention,
        operator="fused_deformable_attention",
        parameters={
            "forward": (
                names(
                    "query key value identity query_pos key_padding_mask reference_points spatial_shapes "
                    "level_start_index"
                ),
                names("kwargs"),
            )
        },
        attributes=(
            "num_heads",
            "num_levels",
            "num_points",
            "batch_first",
            "sampling_offsets",
            "attention_weights",
            "value_proj",
            "output_proj",
            "dropout",
        ),
        bypassed={},
        unfit=_unfit,
        name="MMCVMultiScaleDeformableAttention",
    ),
)

LEFT_ALONE: dict[str, str] = {}
