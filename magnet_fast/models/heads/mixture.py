"""Masks that are mixtures of a few candidates' shares."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-4


def mixture_logit(scores: Tensor, shares: Tensor) -> Tensor:
    """The logit (B, h, w) of Σₙ softmax(scores)ₙ · sharesₙ, kept between 1e-4 and 1 − 1e-4; in float32 at least.

    Args:
        scores: (B, N) logits of the candidates.
        shares: (B, N, h, w), from 0 to 1, of each pixel that is a candidate's.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.to(wide).softmax(dim=1)
    # Multiplied and summed one by one: a matrix product would be rounded under autocast, and 1 − 1e-4 with it.
    return (weights[..., None, None] * shares.to(wide)).sum(dim=1).clamp(_LEAST, 1 - _LEAST).logit()
