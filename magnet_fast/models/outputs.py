"""What every model of this package returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class SegmentationOutput:
    """Predictions for a batch of image-expression pairs.

    Attributes:
        mask_logits: (B, 1, H/4, W/4) for MagNet (sigmoid gives the referent's probability);
            (B, 2, H, W) for LAVT (softmax over background and referent).
        class_logits: (B, 1, 2) for MagNet, index 1 = "the query is the referent"; None for LAVT.
        auxiliary: the earlier predictions, (mask_logits, class_logits) of the shapes above, first to last.
        mask_features: (B, C, H/4, W/4) the per-pixel embedding the mask is read from; None for LAVT.
        text_features: (B, T, D) word features after the text encoder (and its exchanges).
    """

    mask_logits: Tensor
    class_logits: Tensor | None
    auxiliary: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mask_features: Tensor | None = None
    text_features: Tensor | None = None
