"""Picture and sentence as wholes: what a sentence finds in its picture resembles it, and no other of the batch.

In the style of two-stage multi-modal interaction, of which only an abstract is public; the loss is our choice, that of
CLIP (Radford et al., ICML 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction
from magnet_fast.models.heads.global_gate import PIXELS, SENTENCE
from magnet_fast.training.distributed import gathered
from magnet_fast.training.terms.term import Term, TermConfig, register


class GlobalAlignmentConfig(TermConfig):
    """CLIP's first temperature; the weight of 0.1 is our choice."""

    weight: float = Field(0.1, ge=0, description="of the loss in the sum; 0 leaves the term out")
    temperature: float = Field(0.07, gt=0)


@register("global_alignment")
class GlobalAlignmentTerm(Term):
    """`global_alignment_loss` over the batch of all processes; for models whose head is a `global_gate`.

    It has nothing of its own: both vectors are the gate's. Beside the alignment loss, which compares pixels within one
    picture, this one compares pictures.
    """

    config_class = GlobalAlignmentConfig
    logged = ("global",)

    def __init__(self, config: GlobalAlignmentConfig) -> None:
        super().__init__(config)
        self.temperature = config.temperature

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if PIXELS not in prediction.extra:
            raise self.refuse(f"the model's predictions have no {PIXELS} and {SENTENCE}; the head global_gate has them")
        ids, mask = batch["text"]
        loss = global_alignment_loss(
            prediction.extra[PIXELS],
            prediction.extra[SENTENCE],
            batch["image_id"],
            ids.masked_fill(~mask, -1),
            batch["exists"] & mask.any(dim=1),
            self.temperature,
        )
        return loss, {"global": loss.detach()}


def global_alignment_loss(
    found: Tensor, said: Tensor, image: Tensor, text: Tensor, paired: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy both ways over the matrix of all pictures and sentences:

        a = found / |found|,  b = said / |said|
        L = 1/2 mean_i [ -log softmax_j(a_i . b_j / t)_i  - log softmax_j(a_j . b_i / t)_i ]

    A pair j of the same image as i, or of the same sentence, is not wrong: it stays out of i's sums. A pair that does
    not count takes no part. Under torch.distributed the pairs of all processes are compared: the value is the same in
    each, and the mean of their gradients is that of one process with the whole batch.

    Args:
        found, said: (B, d) what the sentence finds in the picture, and the sentence.
        image: (B,) int64 ids of the images.
        text: (B, T) int64 ids of the sentences.
        paired: (B,) bool, which pairs count: a sentence that names nothing has none in its picture [our choice].
        temperature: t.

    Returns:
        A float32 scalar, 0 where fewer than two pairs count.
    """
    with torch.autocast(found.device.type, enabled=False):
        a, b = (gathered(F.normalize(side.float(), dim=1, eps=1e-6)) for side in (found, said))
        image, text, paired = gathered(image), gathered(text), gathered(paired)
        similarity = a @ b.T / temperature
        alike = (image[:, None] == image) | (text[:, None] == text).all(dim=-1)
        left_out = (alike | ~(paired[:, None] & paired)) & ~torch.eye(len(image), dtype=torch.bool, device=image.device)
        similarity = similarity.masked_fill(left_out, torch.finfo(similarity.dtype).min)
        own = similarity.diagonal()
        each = (similarity.logsumexp(dim=1) + similarity.logsumexp(dim=0)) / 2 - own
        return each.masked_fill(~paired, 0.0).sum() / paired.sum().clamp(min=1)
