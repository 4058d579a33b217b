"""What each region of a grid holds: cross-entropy of a model's coarse map with the mask's middle points (ReLA)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.term import Term, TermConfig, register

_MAP = "minimap"


class MinimapConfig(TermConfig):
    """Weights of the classes, by default ReLA's."""

    background: float = Field(0.9, gt=0)
    target: float = Field(1.1, gt=0)


@register("minimap")
class MinimapTerm(Term):
    """`minimap_loss`; for models whose predictions have `extra["minimap"]`."""

    config_class = MinimapConfig
    logged = ("minimap",)

    def __init__(self, config: MinimapConfig) -> None:
        super().__init__(config)
        self.background, self.target = config.background, config.target

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if _MAP not in prediction.extra:
            raise self.refuse(f"the model's predictions have no {_MAP}")
        loss = minimap_loss(prediction.extra[_MAP], batch["mask"], self.background, self.target)
        return loss, {"minimap": loss.detach()}


def minimap_loss(logits: Tensor, mask: Tensor, background: float, target: float) -> Tensor:
    """sum(w CE) / sum(w) over the cells of the batch.

    Args:
        logits: (B, n, n), target minus background.
        mask: (B, H, W) ground truth.
        background, target: w of a cell by its ground truth.

    A cell is the target's where the mask, resized bilinearly without smoothing, is 1 all through: where the pixels
    around the cell's middle all belong to it.
    """
    with torch.autocast(logits.device.type, enabled=False):
        cells = F.interpolate(mask[:, None].float(), size=logits.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        inside = cells >= 1
        weight = torch.where(inside, target, background)
        entropy = F.softplus(torch.where(inside, -logits.float(), logits.float()))
        return (weight * entropy).sum() / weight.sum()
