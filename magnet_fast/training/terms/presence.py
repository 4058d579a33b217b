"""Whether anything is named: cross-entropy on the presence, at every prediction of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.term import Term, TermConfig, register, says_presence


@register("presence")
class PresenceTerm(Term):
    """`presence_loss`, summed over the predictions as Mask2Former sums its class losses."""

    logged = ("presence",)

    @classmethod
    def build(cls, config: TermConfig, model: nn.Module, tokenizer: Any) -> PresenceTerm:
        if not says_presence(model):
            raise cls.refuse("the model cannot say whether anything is named (no presence part, and a head without)")
        return cls(config)

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses = presence_loss(prediction, batch["exists"])
        return losses.sum(), {"presence": losses.detach().mean()}


def presence_loss(prediction: Prediction, exists: Tensor) -> Tensor:
    """(N,) float32: the cross-entropy of the final presence and of each earlier one that has any, means over images.

    Args:
        prediction: presence logits (B,).
        exists: (B,) bool, whether the sentence names anything.
    """
    logits = [each.presence for each in (prediction, *prediction.earlier) if each.presence is not None]
    if not logits or exists.shape != logits[0].shape:
        given = "no presence" if not logits else f"presence {tuple(logits[0].shape)}"
        raise ValueError(f"exists: expected one value an image for {given}, got {tuple(exists.shape)}")
    with torch.autocast(exists.device.type, enabled=False):
        stacked = torch.stack(logits).float()  # (N, B)
        target = exists.to(torch.float32).expand_as(stacked)
        return F.binary_cross_entropy_with_logits(stacked, target, reduction="none").mean(dim=1)
