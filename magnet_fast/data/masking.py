"""Masked language modelling's choice of tokens, for Mask Grounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from magnet_fast.data.tokenizer import Tokenizer

SCHEMES = {"90/10": (0.9, 0.0), "80/10/10": (0.8, 0.1)}
"""Shares of the chosen tokens that become [MASK] and that become a random token; the rest stay as they are."""


class MaskedTokens(NamedTuple):
    """A batch of sentences with some tokens hidden.

    Attributes:
        input_ids: (B, T) int64, the chosen tokens replaced.
        positions: (B, K) int64, where the chosen tokens stand; K is the most that a sentence of T can have.
        targets: (B, K) int64, what stood there.
        valid: (B, K) bool; a sentence of few words fills fewer than K places.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    valid: Tensor


class TokenMasker:
    """Chooses tokens of sentences and hides them.

    Of the n tokens of a sentence that are not special, max(1, round(share * n)) are chosen, all alike likely, as
    BERT's own data are made. That number depends on the sentence alone, so shapes are static: nothing waits for
    the device. Every choice comes from torch's generator of the tensors' device.

    Args:
        tokenizer: whose special tokens are never chosen; it needs a [MASK].
        share: of the tokens, above 0 and at most 1.
        scheme: ``"90/10"`` (ovr-cnn's, whose masking MagNet took: [MASK] or unchanged) or ``"80/10/10"`` (BERT's:
            [MASK], a random token, or unchanged).

    Raises:
        ValueError: an unknown scheme, a share out of range, or a vocabulary without [MASK].
    """

    def __init__(self, tokenizer: Tokenizer, share: float = 0.15, scheme: str = "90/10") -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
        special = tokenizer.special_ids
        if "[MASK]" not in special:
            raise ValueError(f"tokenizer: {tokenizer.vocab_path} lacks [MASK], which masking needs")
        self.mask_id, self.share, self.scheme = special["[MASK]"], share, scheme
        ordinary = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        ordinary[list(special.values())] = False
        self._ordinary = ordinary  # (vocabulary,)
        self._ordinary_ids = ordinary.nonzero()[:, 0]

    @property
    def ordinary_words(self) -> int:
        """Entries of the vocabulary that may be chosen."""
        return len(self._ordinary_ids)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> MaskedTokens:
        """input_ids, attention_mask (B, T) as the tokenizer makes them, on one device."""
        device, words = input_ids.device, input_ids.shape[1]
        if self._ordinary.device != device:
            self._ordinary, self._ordinary_ids = self._ordinary.to(device), self._ordinary_ids.to(device)
        candidates = self._ordinary[input_ids] & attention_mask.bool()
        count = candidates.sum(dim=1, keepdim=True)  # (B, 1)
        wanted = torch.where(count > 0, (self.share * count + 0.5).floor().clamp(min=1), 0)
        most = max(1, math.floor(self.share * words + 0.5))
        # The first of the candidates in a random order: those with the largest random numbers.
        lottery = torch.rand(input_ids.shape, device=device).masked_fill(~candidates, -1.0)
        positions = lottery.topk(most, dim=1).indices
        valid = torch.arange(most, device=device) < wanted
        targets = input_ids.gather(1, positions)

        masked, randomised = SCHEMES[self.scheme]
        fate = torch.rand(positions.shape, device=device)
        other = torch.randint(len(self._ordinary_ids), positions.shape, device=device)
        replaced = torch.where(fate < masked, self.mask_id, targets)
        replaced = torch.where((fate >= masked) & (fate < masked + randomised), self._ordinary_ids[other], replaced)
        hidden = input_ids.scatter(1, positions, torch.where(valid, replaced, targets))
        return MaskedTokens(hidden, positions, targets, valid)
