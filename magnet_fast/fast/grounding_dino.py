"""Grounding DINO and MM Grounding DINO: deformable attention is replaced, the bidirectional attention is not.

Their bidirectional attention shares one similarity between both directions, as `ops.cross_modal_attention` can, and its
clamps at 50,000 below the maximum would change nothing. Three other things would: it hands back both attention maps,
pixels x words, to whoever calls it; padded pixels are no keys for the words, and the operator has a mask of words only;
and a masked word still reads the image, where the operator gives it a row of zeros.
"""

from __future__ import annotations

from magnet_fast.fast.transformers_deformable import deformable_replacement

_BIDIRECTIONAL = (
    "it returns its pixels x words attention maps, masks pixels as well as words, and lets masked words read the "
    "image; the fused cross-modal attention does none of the three"
)

REPLACEMENTS = (
    deformable_replacement("grounding_dino.modeling_grounding_dino.GroundingDinoMultiscaleDeformableAttention"),
    deformable_replacement("mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoMultiscaleDeformableAttention"),
)

LEFT_ALONE = {
    "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention": _BIDIRECTIONAL,
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention": (
        _BIDIRECTIONAL
    ),
}
