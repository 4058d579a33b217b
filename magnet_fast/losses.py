"""Training losses of referring segmentation.

The segmentation loss follows Mask2Former (binary cross-entropy and Dice on the mask, cross-entropy on the
class, summed over every prediction of the decoder); the weights 2, 2, 1 are our choice. The alignment and the
grounding loss are MagNet's (Chng et al., CVPR 2024).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_fast import ops


class LossWeights(NamedTuple):
    """Factors of the three parts of the segmentation loss."""

    bce: float = 2.0
    dice: float = 2.0
    classification: float = 1.0


def segmentation_loss(output: Any, mask: Tensor, weights: LossWeights | None = None) -> dict[str, Tensor]:
    """BCE and Dice on the mask and cross-entropy on the class, at every prediction of the model.

    Args:
        output: what a model returns: ``mask_logits`` (B, 1, h, w) for a sigmoid or (B, 2, h, w) for a softmax
            over {background, referent}; ``class_logits`` (B, 1, 2), index 1 = referent, or None;
            ``auxiliary``, a list of (mask_logits, class_logits) of the earlier predictions, may be empty.
        mask: (B, H, W) ground truth of the referent, any dtype, values in [0, 1].
        weights: factors of the parts; default BCE 2, Dice 2, class 1.

    Returns:
        Scalars in float32 under the keys ``total`` (the weighted sum over all predictions, to be
        differentiated) and ``bce``, ``dice``, ``class`` (unweighted, detached means over the predictions, for
        the log). ``class`` is 0 for a model without class logits.

    Each part is a mean over the images of the batch, so equal shares of a batch may be averaged. The class
    target of an image is 1 when its mask has any pixel, else 0; an empty mask also trains the mask logits
    towards empty.

    The resolution is our choice. The last prediction is compared at (H, W) after the very resize that
    inference applies (bilinear, align_corners=True). The auxiliary ones stay at (h, w), a sixteenth of the
    pixels: there the mask is brought down to them, each logit being compared with the mask around the pixel
    where that resize would put it (see `mask_at`).

    The arithmetic is float32 also under autocast: sums over a mask overflow float16 and drown in bfloat16.
    """
    weights = weights or LossWeights()
    _check(output, mask)
    with torch.autocast(output.mask_logits.device.type, enabled=False):
        mask = mask.to(torch.float32)
        present = mask.flatten(1).any(dim=1).long()  # (B,)
        final = output.mask_logits.float()
        if final.shape[-2:] != mask.shape[-2:]:
            final = F.interpolate(final, size=mask.shape[-2:], mode="bilinear", align_corners=True)
        bce, dice = _mask_losses(final[None], mask)
        if output.auxiliary:
            earlier = torch.stack([logits for logits, _ in output.auxiliary]).float()  # (N, B, K, h, w)
            earlier_bce, earlier_dice = _mask_losses(earlier, mask_at(mask, earlier.shape[-2:]))
            bce, dice = torch.cat([bce, earlier_bce]), torch.cat([dice, earlier_dice])
        total = weights.bce * bce.sum() + weights.dice * dice.sum()

        classes = [output.class_logits, *(logits for _, logits in output.auxiliary)]
        classes = [logits for logits in classes if logits is not None]
        if classes:
            stacked = torch.stack(classes).float().flatten(0, 2)  # (N*B, 2)
            entropy = F.cross_entropy(stacked, present.repeat(len(classes)))
            total = total + weights.classification * len(classes) * entropy
        else:
            entropy = torch.zeros((), device=mask.device)
    return {
        "total": total,
        "bce": bce.detach().mean(),
        "dice": dice.detach().mean(),
        "class": entropy.detach(),
    }


def alignment_loss(
    mask_features: Tensor,
    sentence: Tensor,
    mask: Tensor,
    *,
    pixel_temperature: float = 0.1,
    text_temperature: float = 0.1,
) -> dict[str, Tensor]:
    """The Cross-modal Alignment Loss: pixels of the referent resemble each other, and the sentence.

    With z the L2-normalised mask features, t the L2-normalised sentence, + the pixels inside the mask::

        p2p = `ops.pixel_contrastive_loss`
        p2t = mean_{i in +} -log( exp(z_i . t / tau) / (exp(z_i . t / tau) + sum_{k in -} exp(z_k . t / tau)) )

    Args:
        mask_features: (B, C, h, w) the embedding of the pixels that the mask is read from, all of them used.
        sentence: (B, C) the projected mean word feature.
        mask: (B, H, W) ground truth of the referent in [0, 1], brought to (h, w) as in `mask_at`; a pixel is
            inside from one half on.
        pixel_temperature, text_temperature: above 0. The paper gives neither; 0.1 is our choice.

    Returns:
        float32 scalars ``p2p`` and ``p2t``, means over the images. An image whose mask is empty at (h, w) adds 0
        to both; one whose mask is full, too: without pixels outside there is nothing to tell apart.
    """
    if mask_features.dim() != 4 or sentence.shape != mask_features.shape[:2]:
        raise ValueError(
            f"sentence: expected batch and channels of mask_features {tuple(mask_features.shape)}, "
            f"got {tuple(sentence.shape)}"
        )
    with torch.autocast(mask_features.device.type, enabled=False):
        inside = mask_at(mask.to(torch.float32), mask_features.shape[-2:]) >= 0.5  # (B, h, w)
        p2p = ops.pixel_contrastive_loss(mask_features, inside, temperature=pixel_temperature)
        pixels = F.normalize(mask_features.float().flatten(2), dim=1, eps=1e-6)  # (B, C, P)
        text = F.normalize(sentence.float(), dim=1, eps=1e-6)
        similarity = torch.einsum("bcp,bc->bp", pixels, text) / text_temperature
        inside = inside.flatten(1)
        # The lowest finite number stands for "no pixel outside": softplus of it is exactly 0, and no NaN is made.
        outside = similarity.masked_fill(inside, torch.finfo(similarity.dtype).min).logsumexp(1, keepdim=True)
        # -log(e^s / (e^s + e^o)) = softplus(o - s)
        terms = F.softplus(outside - similarity).masked_fill(~inside, 0.0)
        p2t = terms.sum(1) / inside.sum(1).clamp(min=1)
    return {"p2p": p2p.mean(), "p2t": p2t.mean()}


def grounding_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the chosen tokens.

    Args:
        logits: (B, K, V). targets: (B, K) int64. valid: (B, K) bool, which of them count.

    Returns:
        (loss, accuracy), float32 scalars, both 0 where no token was chosen; the accuracy carries no gradient.
    """
    count = valid.sum().clamp(min=1)
    entropy = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    loss = entropy.masked_fill(~valid, 0.0).sum() / count
    right = (logits.detach().argmax(dim=-1) == targets) & valid
    return loss, right.sum() / count


def mask_at(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bring masks (B, H, W) down to ``size`` = (h, w): the targets, in [0, 1], of logits that live on that
    grid.

    Logit (i, j) is shown by inference at pixel (i (H-1)/(h-1), j (W-1)/(w-1)) (bilinear, align_corners=True),
    so its target is the mask's mean over a box around that pixel, as wide as the grid's step rounded down to
    an odd number. Plain average pooling would put the targets up to a step and a half of pixels beside where
    they are shown.
    """
    height, width = mask.shape[-2:]
    if (height, width) == tuple(size):
        return mask
    mask = mask[:, None]
    box = tuple(_odd(side // cells) for side, cells in zip((height, width), size, strict=True))
    if box != (1, 1):
        padding = (box[0] // 2, box[1] // 2)
        mask = F.avg_pool2d(mask, box, stride=1, padding=padding, count_include_pad=False)
    return F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=True)[:, 0]


def _odd(step: int) -> int:
    return max(1, step if step % 2 else step - 1)


def _mask_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, B, K, h, w) float32 logits of N predictions against (B, h, w) targets -> BCE (N,) and Dice (N,)."""
    # A softmax over two logits is the sigmoid of their difference, and so are its cross-entropy and its Dice.
    logits = logits[:, :, 1] - logits[:, :, 0] if logits.shape[2] == 2 else logits[:, :, 0]
    logits = logits.flatten(2)  # (N, B, P)
    target = target.flatten(1)  # (B, P)
    # max(x, 0) - x t + log(1 + exp(-|x|)), with the target broadcast over the predictions.
    bce = (F.softplus(logits) - logits * target).mean(dim=(1, 2))
    probability = logits.sigmoid()
    overlap = torch.einsum("nbp,bp->nb", probability, target)
    # The 1 keeps an empty mask defined (Mask2Former): nothing predicted there costs nothing.
    dice = 1 - (2 * overlap + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    return bce, dice.mean(dim=1)


def _check(output: Any, mask: Tensor) -> None:
    logits = output.mask_logits
    if mask.dim() != 3:
        raise ValueError(f"mask: expected shape (B, H, W), got {tuple(mask.shape)}")
    if logits.dim() != 4 or logits.shape[1] not in (1, 2):
        raise ValueError(f"output.mask_logits: expected shape (B, 1 or 2, h, w), got {tuple(logits.shape)}")
    if logits.shape[0] != mask.shape[0]:
        raise ValueError(f"mask: {mask.shape[0]} masks for {logits.shape[0]} predictions (output.mask_logits)")
