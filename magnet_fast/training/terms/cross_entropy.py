"""Cross-entropy of target and background with a weight for each class: LAVT's, ReLA's and RefSegformer's loss."""

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
    """Weights of the classes, by default those of LAVT's released training code; RefSegformer's are 1, 1, 0.4, 0.4."""

    background: float = Field(0.9, gt=0)
    target: float = Field(1.1, gt=0)
    absent: float | None = Field(
        None, ge=0, description="factor of the sentences that name nothing, a mean of their own; none: one mean of all"
    )
    earlier: float = Field(0.0, ge=0, description="factor of each earlier prediction")


@register("cross_entropy")
class CrossEntropyTerm(Term):
    """`weighted_cross_entropy` with the recipe's weights."""

    config_class = CrossEntropyConfig
    logged = ("cross_entropy",)

    def __init__(self, config: CrossEntropyConfig) -> None:
        super().__init__(config)
        self.background, self.target = config.background, config.target
        self.absent, self.earlier = config.absent, config.earlier

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._one(prediction, batch)
        total = loss
        if self.earlier:
            for before in prediction.earlier:
                total = total + self.earlier * self._one(before, batch)
        return total, {"cross_entropy": loss.detach()}

    def _one(self, prediction: Prediction, batch: dict[str, Any]) -> Tensor:
        weights = self.background, self.target
        if self.absent is None:
            return weighted_cross_entropy(prediction, batch["mask"], *weights)
        exists = batch["exists"]
        named = weighted_cross_entropy(prediction, batch["mask"], *weights, of=exists)
        return named + self.absent * weighted_cross_entropy(prediction, batch["mask"], *weights, of=~exists)


def weighted_cross_entropy(
    prediction: Prediction, mask: Tensor, background: float, target: float, of: Tensor | None = None
) -> Tensor:
    """sum(w CE) / sum(w) over all pixels of the batch, at the mask's size, of a prediction.

    The logit of a prediction is the difference of the pair's, target minus background; the cross-entropy of the pair
    is that of the difference with a sigmoid.

    Args:
        prediction: mask logits (B, h, w).
        mask: (B, H, W) ground truth; a pixel is the target's from one half on.
        background, target: w of a pixel by its ground truth.
        of: (B,) bool, the images that count; none at all gives 0.

    Returns:
        A float32 scalar. Its denominator depends on the masks: shares of a batch average to it nearly, not exactly.
    """
    check_mask(prediction, mask)
    with torch.autocast(prediction.mask.device.type, enabled=False):
        logits = resized(prediction, mask.shape[-2:])
        inside = mask >= 0.5
        weight = torch.where(inside, target, background)
        if of is not None:
            weight = weight * of[:, None, None]
        entropy = F.softplus(torch.where(inside, -logits, logits))
        total = weight.sum()
        return (weight * entropy).sum() / (total if of is None else total.clamp(min=min(background, target)))
