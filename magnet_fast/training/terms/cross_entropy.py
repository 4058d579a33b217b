"""Cross-entropy of target and background with a weight for each class: LAVT's published loss."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction, resized
from magnet_fast.training.terms.mask import check_mask
from magnet_fast.training.terms.term import Term, TermConfig, register


class CrossEntropyConfig(TermConfig):
    """Weights of the classes; the defaults are those of LAVT's released training code."""

    background: float = Field(0.9, gt=0)
    target: float = Field(1.1, gt=0)


@register("cross_entropy")
class CrossEntropyTerm(Term):
    """`weighted_cross_entropy` with the recipe's weights."""

    config_class = CrossEntropyConfig
    logged = ("cross_entropy",)

    def __init__(self, config: CrossEntropyConfig) -> None:
        super().__init__(config)
        self.background, self.target = config.background, config.target

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = weighted_cross_entropy(prediction, batch["mask"], self.background, self.target)
        return loss, {"cross_entropy": loss.detach()}


def weighted_cross_entropy(prediction: Prediction, mask: Tensor, background: float, target: float) -> Tensor:
    """sum(w CE) / sum(w) over all pixels of the batch, at the mask's size, of the final prediction.

    The logit of a prediction is the difference of the pair's, target minus background; the cross-entropy of the pair
    is that of the difference with a sigmoid.

    Args:
        prediction: mask logits (B, h, w).
        mask: (B, H, W) ground truth; a pixel is the target's from one half on.
        background, target: w of a pixel by its ground truth.

    Returns:
        A float32 scalar. Its denominator depends on the masks: shares of a batch average to it nearly, not exactly.
    """
    check_mask(prediction, mask)
    with torch.autocast(prediction.mask.device.type, enabled=False):
        logits = resized(prediction, mask.shape[-2:])
        inside = mask >= 0.5
        weight = torch.where(inside, target, background)
        entropy = F.softplus(torch.where(inside, -logits, logits))
        return (weight * entropy).sum() / weight.sum()
