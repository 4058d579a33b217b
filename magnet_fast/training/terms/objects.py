"""What class and which box the object of each pixel has: what a photograph's regions teach beside its sentences."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.term import Term, TermConfig, register

_KNOWN = ("classes", "boxes")


class ObjectsConfig(TermConfig):
    """How many classes, and what the parts count [our choice]."""

    classes: int = Field(gt=0, description="the data's classes are numbered from 1 to this")
    unknown: float = Field(0.2, ge=0, description="weight of pixels of no region: some are of stuff that is not marked")
    box: float = Field(2.0, ge=0, description="weight of the box's part")
    smoothing: float = Field(0.1, ge=0, lt=1, description="of the classes")


@register("objects")
class ObjectsTerm(Term):
    """Cross-entropy of the classes, by a convolution that the term owns, and L1 of the boxes that the fusion says.

    For models with the fusion `objects`, and data whose samples carry `classes` and `boxes` (`data.phrases`).
    """

    config_class = ObjectsConfig
    logged = ("classes", "boxes")
    looks = True

    def __init__(self, config: ObjectsConfig, width: int) -> None:
        super().__init__(config)
        self.unknown, self.box, self.smoothing = config.unknown, config.box, config.smoothing
        self.classify = nn.Conv2d(width, config.classes + 1, 1)

    @classmethod
    def build(cls, config: ObjectsConfig, model: nn.Module, tokenizer: Any) -> ObjectsTerm:
        width = getattr(getattr(model.config, "fusion", None), "middle", None)
        if width is None:
            raise cls.refuse("the model has no fusion that says boxes (objects)")
        return cls(config, width)

    def check(self, dataset: Any) -> None:
        if not set(_KNOWN) <= set(dataset.context):
            raise self.refuse("the data's samples have no classes and boxes; data.phrases makes them")
        known = self.classify.out_channels - 1
        if len(dataset.names) > known:
            raise ValueError(f"terms.objects.classes: expected at least the data's {len(dataset.names)}, got {known}")

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _, middle, _, said = batch["looked"]
        each = len(batch["image"]) // len(middle)
        classes, boxes = (batch["extra"][name][::each] for name in _KNOWN)
        with torch.autocast(middle.device.type, enabled=False):
            logits = self.classify(middle.float())
            weight = logits.new_ones(logits.shape[1])
            weight[0] = self.unknown
            entropy = F.cross_entropy(logits, classes, weight, label_smoothing=self.smoothing)
            inside = boxes[:, 2] > 0
            off = (said.float() - boxes).abs().sum(dim=1)
            box = (off * inside).sum() / inside.sum().clamp(min=1)
        return entropy + self.box * box, {"classes": entropy.detach(), "boxes": box.detach()}
