"""Which node of a scene is named: cross-entropy over the nodes that a model chooses among (DuMoGa)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.term import Term, TermConfig, register

_SCORES, _PROPOSALS = "nodes", "proposals"


@register("node_choice")
class NodeChoiceTerm(Term):
    """`node_loss`; for models whose predictions have `extra["nodes"]`, and data whose samples have `proposals`."""

    logged = ("node_choice", "node_accuracy")

    @classmethod
    def build(cls, config: TermConfig, model: nn.Module, tokenizer: Any) -> NodeChoiceTerm:
        if _PROPOSALS not in model.needs:
            raise cls.refuse("the model chooses among no proposals")
        return cls(config)

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores = prediction.extra[_SCORES]
        target, known = best_node(batch["extra"][_PROPOSALS], batch["mask"])
        loss = node_loss(scores, target, known)
        right = ((scores.argmax(dim=1) == target) & known).sum() / known.sum().clamp(min=1)
        return loss, {"node_choice": loss.detach(), "node_accuracy": right.detach()}


def node_loss(scores: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Mean cross-entropy, float32, over the images whose node is known; 0 where none is.

    Args:
        scores: (B, N) logits.
        target: (B,) int64.
        known: (B,) bool.
    """
    entropy = F.cross_entropy(scores.float(), target, reduction="none")
    return entropy.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)


def best_node(proposals: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The node that overlaps the truth most, by IoU of shares of cells; the released code takes boxes' [our choice].

    Args:
        proposals: (B, N, h, w), each node's share of each cell.
        mask: (B, H, W) ground truth of 0 and 1.

    Returns:
        Its place (B,) int64, and whether any node overlaps (B,) bool.
    """
    truth = F.adaptive_avg_pool2d(mask[:, None].float(), proposals.shape[-2:])
    proposals = proposals.float()
    both = torch.minimum(proposals, truth).sum(dim=(2, 3))
    either = torch.maximum(proposals, truth).sum(dim=(2, 3))
    overlap, place = (both / either.clamp(min=1e-6)).max(dim=1)
    return place, overlap > 0
