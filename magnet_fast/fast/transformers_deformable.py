"""transformers' multi-scale deformable attention modules on the fused operator.

Mask2Former, OneFormer, Deformable DETR, RT-DETR and RT-DETR v2, Grounding DINO and the models that carry a copy of the
same module. The operator takes the raw offsets and logits: softmax, location arithmetic and sampling are one kernel.
The weights that the modules hand back beside their result are computed as ever, one softmax of the logits, so that
`output_attentions` and hooks find what they found before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.fast._as_made import as_made, held
from magnet_fast.fast._replacement import Replacement, must_run_original, names, parts_changed


class _DeformableAttention:
    """Multi-scale deformable attention of Deformable DETR; `attention_mask` is True where a pixel is real."""

    _mask_is_padding = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        shapes = _python_shapes(kwargs.get("spatial_shapes_list"), kwargs.get("spatial_shapes"))
        points = self._points(reference_points)
        bypassed = [self.attn] if hasattr(self, "attn") else []
        if args or shapes is None or points is None or parts_changed(self) or must_run_original(self, *bypassed):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                *args,
                **kwargs,
            )
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            padding = attention_mask if self._mask_is_padding else ~attention_mask
            value = value.masked_fill(padding[..., None], 0.0)
        offsets = self.sampling_offsets(hidden_states).unflatten(2, (self.n_heads, self.n_levels, self.n_points, 2))
        logits = self.attention_weights(hidden_states).unflatten(2, (self.n_heads, self.n_levels * self.n_points))
        out = ops.fused_deformable_attention(
            value.unflatten(2, (self.n_heads, self.d_model // self.n_heads)),
            shapes,
            _place(points, value),
            self._scaled(offsets),
            logits.unflatten(3, (self.n_levels, self.n_points)),
        )
        return self.output_proj(out), self._weights(logits)

    def _points(self, reference_points: Tensor | None) -> Tensor | None:
        """As the operator takes them, or None where the original has to see them."""
        if reference_points is None or reference_points.dim() != 4 or reference_points.shape[-1] not in (2, 4):
            return None
        if reference_points.shape[2] == 1:
            return reference_points.squeeze(2)
        return reference_points if reference_points.shape[2] == self.n_levels else None

    def _scaled(self, offsets: Tensor) -> Tensor:
        return offsets

    def _weights(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, -1).unflatten(3, (self.n_levels, self.n_points))


class _MaskOfPadding(_DeformableAttention):
    """The module of Mask2Former and OneFormer, whose `attention_mask` is True where a pixel is padding."""

    _mask_is_padding = True


class _DeformableAttentionV2(_DeformableAttention):
    """RT-DETR v2 with the same number of points on every level; the factor of an offset is a setting."""

    def _points(self, reference_points: Tensor | None) -> Tensor | None:
        # Points without a box have never run there: shapes do not fit.
        if reference_points is None or reference_points.shape[-1] != 4 or reference_points.shape[-2] != 1:
            return None
        return super()._points(reference_points)

    def _scaled(self, offsets: Tensor) -> Tensor:
        # The operator's own factor is Deformable DETR's, half a box.
        return offsets if self.offset_scale == 0.5 else offsets * (2.0 * self.offset_scale)

    def _weights(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, -1)


def _python_shapes(shapes: Any, tensor: Tensor | None) -> Sequence[tuple[int, int]] | None:
    """The maps' sizes as Python ints; OneFormer passed a tensor alone up to transformers 5.17, which is read back."""
    if shapes is None and isinstance(tensor, Tensor) and not torch.compiler.is_compiling():
        return [(height, width) for height, width in tensor.tolist()]
    if not isinstance(shapes, (list, tuple)):
        return None
    sides = [side for shape in shapes for side in shape]
    return shapes if all(isinstance(side, (int, torch.SymInt)) for side in sides) else None


def _place(points: Tensor, value: Tensor) -> Tensor:
    """Points for every item of the batch, in a dtype that goes with `value`'s."""
    if points.dtype != torch.float32 or value.dtype == torch.float64:
        points = points.to(value.dtype)
    return points.expand(value.shape[0], *points.shape[1:])


def _unfit(module: nn.Module) -> str | None:
    expected = module.n_heads * module.n_levels * module.n_points
    for name, outputs in (("sampling_offsets", 2 * expected), ("attention_weights", expected)):
        if getattr(getattr(module, name), "out_features", None) != outputs:
            return f"its {name} does not have {outputs} outputs: heads x levels x points"
    return None


def _unfit_v2(module: nn.Module) -> str | None:
    if module.method != "default":
        return f"its sampling method is {module.method!r}, not bilinear"
    if any(points != module.n_points for points in module.n_points_list):
        return "its levels have different numbers of points"
    if not as_made(module, "n_points_scale", module.n_points, lambda: _scale_of_points(module)):
        return "it scales its points otherwise than by their number"
    return _unfit(module)


def _scale_of_points(module: nn.Module) -> Tensor:
    dtype = held(module, "n_points_scale").dtype
    return torch.full((module.n_levels * module.n_points,), 1 / module.n_points, dtype=dtype, device="cpu")


_REQUIRED = names(
    "hidden_states attention_mask encoder_hidden_states encoder_attention_mask position_embeddings reference_points"
)
_OPTIONAL = names("spatial_shapes spatial_shapes_list level_start_index output_attentions kwargs")
_ATTRIBUTES = (
    "d_model",
    "n_heads",
    "n_levels",
    "n_points",
    "sampling_offsets",
    "attention_weights",
    "value_proj",
    "output_proj",
)


def deformable_replacement(path: str, mixin: type = _DeformableAttention) -> Replacement:
    """The replacement of one module that computes as Deformable DETR's does."""
    second = issubclass(mixin, _DeformableAttentionV2)
    # These two call a function to sample, the others a submodule without parameters.
    by_function = issubclass(mixin, (_DeformableAttentionV2, _MaskOfPadding))
    sampling = f"transformers.models.{path.rpartition('.')[0]}.MultiScaleDeformableAttention"
    return Replacement(
        path=f"transformers.models.{path}",
        mixin=mixin,
        operator="fused_deformable_attention",
        parameters={"forward": (_REQUIRED, _OPTIONAL)},
        attributes=(*_ATTRIBUTES, "method", "n_points_list", "n_points_scale", "offset_scale")
        if second
        else _ATTRIBUTES,
        bypassed={} if by_function else {"attn": sampling},
        unfit=_unfit_v2 if second else _unfit,
    )


REPLACEMENTS = (
    deformable_replacement("deformable_detr.modeling_deformable_detr.DeformableDetrMultiscaleDeformableAttention"),
    deformable_replacement("rt_detr.modeling_rt_detr.RTDetrMultiscaleDeformableAttention"),
    deformable_replacement(
        "rt_detr_v2.modeling_rt_detr_v2.RTDetrV2MultiscaleDeformableAttention", _DeformableAttentionV2
    ),
    deformable_replacement(
        "mask2former.modeling_mask2former.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention", _MaskOfPadding
    ),
    deformable_replacement(
        "oneformer.modeling_oneformer.OneFormerPixelDecoderEncoderMultiscaleDeformableAttention", _MaskOfPadding
    ),
    deformable_replacement("lw_detr.modeling_lw_detr.LwDetrMultiscaleDeformableAttention"),
    deformable_replacement("rf_detr.modeling_rf_detr.RfDetrMultiscaleDeformableAttention"),
    deformable_replacement("omdet_turbo.modeling_omdet_turbo.OmDetTurboMultiscaleDeformableAttention"),
    deformable_replacement("pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2MultiscaleDeformableAttention"),
    deformable_replacement("pp_doclayout_v3.modeling_pp_doclayout_v3.PPDocLayoutV3MultiscaleDeformableAttention"),
    deformable_replacement("pp_doclayout_v4.modeling_pp_doclayout_v4.PPDocLayoutV4MultiscaleDeformableAttention"),
)

_LEVELS = "its arithmetic of points and levels is its own (points can differ from level to level)"
LEFT_ALONE = {
    "transformers.models.d_fine.modeling_d_fine.DFineMultiscaleDeformableAttention": _LEVELS,
    "transformers.models.deimv2.modeling_deimv2.Deimv2MultiscaleDeformableAttention": _LEVELS,
}
