"""Which category is named: cross-entropy on what the predicted mask picks out of the embedding of pixels.

In the style of ASGN's semantic guidance (TMM 2020), of which only an abstract is public: semantic information against
the influence of word embeddings. How is our choice.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction, resized
from magnet_fast.training.terms.term import Term, TermConfig, register

_LEAST = 1e-6


class CategoryConfig(TermConfig):
    """How many categories there are; the weight of 0.1 is our choice."""

    weight: float = Field(0.1, ge=0, description="of the loss in the sum; 0 leaves the term out")
    classes: int = Field(90, gt=0, description="the data's category ids are 1 to this; COCO's are 1 to 90")


@register("category")
class CategoryTerm(Term):
    """`category_loss` with a Linear that the term owns; for heads that give an embedding of the pixels.

    Args:
        config: its options.
        pixel_channels: C of the pixels.
    """

    config_class = CategoryConfig
    logged = ("category",)

    def __init__(self, config: CategoryConfig, pixel_channels: int) -> None:
        super().__init__(config)
        self.classify = nn.Linear(pixel_channels, config.classes)

    @classmethod
    def build(cls, config: CategoryConfig, model: nn.Module, tokenizer: Any) -> CategoryTerm:
        channels = getattr(model.head, "pixel_channels", None)
        if channels is None:
            raise cls.refuse("the model gives no embedding of the pixels to classify (model.head.pixel_channels)")
        return cls(config, channels)

    def check(self, dataset: Any) -> None:
        known = dataset.categories
        if not known:
            raise self.refuse("the data do not say of which category things are")
        wrong = [one for one in (min(known), max(known)) if not 1 <= one <= self.classify.out_features]
        if wrong:
            raise ValueError(
                f"terms.category.classes: expected the data's category ids to be 1 to {self.classify.out_features}, "
                f"got {wrong[0]}"
            )

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = category_loss(prediction, batch["category"], self.classify)
        return loss, {"category": loss.detach()}


def category_loss(prediction: Prediction, category: Tensor, classify: nn.Linear) -> Tensor:
    """Cross-entropy of classify(sum_p y_p h_p / sum_p y_p), a mean over the samples whose category is known.

    Args:
        prediction: mask logits (B, h, w), y being their sigmoid at the size of the pixels, and `pixels` (B, C, h', w'),
            which is h.
        category: (B,) int64 ids from 1 on; -1 where unknown.
        classify: C to the number of categories.

    Returns:
        A float32 scalar, 0 where no category is known.
    """
    with torch.autocast(category.device.type, enabled=False):
        pixels = prediction.pixels.float()
        weight = resized(prediction, pixels.shape[-2:]).sigmoid()
        mean = torch.einsum("bchw,bhw->bc", pixels, weight) / weight.sum(dim=(1, 2)).clamp(min=_LEAST)[:, None]
        known = category > 0
        entropy = F.cross_entropy(classify(mean), torch.where(known, category - 1, 0), reduction="none")
        return entropy.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)
