"""Binary cross-entropy and Dice on the mask, at every prediction of the model.

Mask2Former's losses of a mask; the factors 2 and 2 are our choice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models.contract import Prediction, resized
from magnet_fast.training.terms.term import Term, TermConfig, register


class MaskConfig(TermConfig):
    """Factors of the two parts, and where they are compared."""

    bce: float = Field(2.0, ge=0)
    dice: float = Field(2.0, ge=0)
    earlier: float = Field(1.0, ge=0, description="factor of each earlier prediction")
    at: Literal["input", "logits"] = Field(
        "input", description="logits are resized to the mask, or the mask by nearest neighbour to the logits (CRIS)"
    )


@register("mask")
class MaskTerm(Term):
    """`mask_loss` with the recipe's factors."""

    config_class = MaskConfig
    logged = ("bce", "dice")

    def __init__(self, config: MaskConfig) -> None:
        super().__init__(config)
        self.bce, self.dice, self.earlier, self.at = config.bce, config.dice, config.earlier, config.at

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["mask"]
        if self.at == "logits":
            check_mask(prediction, mask)
            size = prediction.mask.shape[-2:]
            mask = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0]
        bce, dice = mask_loss(prediction, mask)
        parts = {"bce": bce.detach().mean(), "dice": dice.detach().mean()}
        bce, dice = (torch.cat([loss[:1], self.earlier * loss[1:]]) for loss in (bce, dice))
        return self.bce * bce.sum() + self.dice * dice.sum(), parts


def mask_loss(prediction: Prediction, mask: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and Dice of the final prediction and of each earlier one.

    The resolution is our choice. The final prediction is compared at (H, W) after the very resize that inference
    applies (`contract.resized`). The earlier ones stay at (h, w), a sixteenth of the pixels: there the mask is
    brought down to them, each logit being compared with the mask around the pixel where that resize would put it (see
    `mask_at`).

    The arithmetic is float32 also under autocast: sums over a mask overflow float16 and drown in bfloat16.

    Args:
        prediction: mask logits (B, h, w), and those of `earlier`, at any size.
        mask: (B, H, W) ground truth of what is named, any dtype, values in [0, 1]; an empty one trains towards empty.

    Returns:
        Two float32 vectors (1 + len(earlier),), the final prediction first, then the earlier ones by size. Each entry
        is a mean over the images, so equal shares of a batch may be averaged.
    """
    check_mask(prediction, mask)
    with torch.autocast(prediction.mask.device.type, enabled=False):
        mask = mask.to(torch.float32)
        parts = [_bce_and_dice(resized(prediction, mask.shape[-2:])[None], mask)]
        alike: dict[tuple[torch.Size, bool], list[Tensor]] = {}
        for before in prediction.earlier:
            alike.setdefault((before.mask.shape[-2:], before.aligned_corners), []).append(before.mask)
        for (size, aligned), logits in alike.items():
            parts.append(_bce_and_dice(torch.stack(logits).float(), mask_at(mask, size, aligned)))
        bce, dice = (torch.cat(part) for part in zip(*parts, strict=True))
    return bce, dice


def mask_at(mask: Tensor, size: tuple[int, int] | torch.Size, aligned: bool = True) -> Tensor:
    """Bring masks (B, H, W) down to `size` = (h, w): the targets, in [0, 1], of logits that live on that grid.

    Logit (i, j) is shown by inference at pixel (i (H-1)/(h-1), j (W-1)/(w-1)) (bilinear, aligned corners), so its
    target is the mask's mean over a box around that pixel, as wide as the grid's step rounded down to an odd number.
    Plain average pooling would put the targets up to a step and a half of pixels beside where they are shown. Where
    inference resizes without aligned corners, plain average pooling is right.
    """
    height, width = mask.shape[-2:]
    if (height, width) == tuple(size):
        return mask
    if not aligned:
        return F.adaptive_avg_pool2d(mask[:, None], tuple(size))[:, 0]
    mask = mask[:, None]
    box = tuple(_odd(side // cells) for side, cells in zip((height, width), size, strict=True))
    if box != (1, 1):
        padding = (box[0] // 2, box[1] // 2)
        mask = F.avg_pool2d(mask, box, stride=1, padding=padding, count_include_pad=False)
    return F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=True)[:, 0]


def check_mask(prediction: Prediction, mask: Tensor) -> None:
    """ValueError where prediction and ground truth are no batches of the same length."""
    logits = prediction.mask
    if mask.dim() != 3:
        raise ValueError(f"mask: expected shape (B, H, W), got {tuple(mask.shape)}")
    if logits.dim() != 3:
        raise ValueError(f"prediction.mask: expected shape (B, h, w), got {tuple(logits.shape)}")
    if logits.shape[0] != mask.shape[0]:
        raise ValueError(f"mask: {mask.shape[0]} masks for {logits.shape[0]} predictions (prediction.mask)")


def _odd(step: int) -> int:
    return max(1, step if step % 2 else step - 1)


def _bce_and_dice(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, B, h, w) float32 logits of N predictions against (B, h, w) targets -> BCE (N,) and Dice (N,)."""
    logits = logits.flatten(2)  # (N, B, P)
    target = target.flatten(1)  # (B, P)
    # max(x, 0) - x t + log(1 + exp(-|x|)), with the target broadcast over the predictions.
    bce = (F.softplus(logits) - logits * target).mean(dim=(1, 2))
    probability = logits.sigmoid()
    overlap = torch.einsum("nbp,bp->nb", probability, target)
    # The 1 keeps an empty mask defined (Mask2Former): nothing predicted there costs nothing.
    dice = 1 - (2 * overlap + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    return bce, dice.mean(dim=1)
