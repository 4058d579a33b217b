"""Whether anything is named: cross-entropy on the presence, at every prediction of the model."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.term import Term, TermConfig, register, says_presence


class PresenceTermConfig(TermConfig):
    """Weights of the sentences; ReLA's are 0.9 and 1.1."""

    present: float = Field(1.0, gt=0, description="of a sentence that names something")
    absent: float = Field(1.0, gt=0, description="of one that names nothing")


@register("presence")
class PresenceTerm(Term):
    """`presence_loss`, summed over the predictions as Mask2Former sums its class losses."""

    config_class = PresenceTermConfig
    logged = ("presence",)

    def __init__(self, config: PresenceTermConfig) -> None:
        super().__init__(config)
        self.present, self.absent = config.present, config.absent

    @classmethod
    def build(cls, config: PresenceTermConfig, model: nn.Module, tokenizer: Any) -> PresenceTerm:
        if not says_presence(model):
            raise cls.refuse("the model cannot say whether anything is named (no presence part, and a head without)")
        return cls(config)

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses = presence_loss(prediction, batch["exists"], self.present, self.absent)
        return losses.sum(), {"presence": losses.detach().mean()}


def presence_loss(prediction: Prediction, exists: Tensor, present: float = 1.0, absent: float = 1.0) -> Tensor:
    """(N,) float32: the cross-entropy of the final presence and of each earlier one that has any, weighted means over
    the images.

    Args:
        prediction: presence logits (B,).
        exists: (B,) bool, whether the sentence names anything.
        present, absent: weights of an image by `exists`.
    """
    logits = [each.presence for each in (prediction, *prediction.earlier) if each.presence is not None]
    if not logits or exists.shape != logits[0].shape:
        given = "no presence" if not logits else f"presence {tuple(logits[0].shape)}"
        raise ValueError(f"exists: expected one value an image for {given}, got {tuple(exists.shape)}")
    with torch.autocast(exists.device.type, enabled=False):
        stacked = torch.stack(logits).float()  # (N, B)
        target = exists.to(torch.float32).expand_as(stacked)
        entropy = F.binary_cross_entropy_with_logits(stacked, target, reduction="none")
        if present == absent:
            return entropy.mean(dim=1)
        weight = torch.where(exists, present, absent)
        return (weight * entropy).sum(dim=1) / weight.sum()
