"""Which tokens of a sentence are hidden, and behind what: masked language modelling's choice, for Mask Grounding."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from magnet_fast.data.tokenizers.base import ExpressionTokenizer
from magnet_fast.models.contract import Text

SCHEMES = {"90/10": (0.9, 0.0), "80/10/10": (0.8, 0.1)}
"""Shares of the chosen tokens that become [MASK] and that become a random token; the rest stay as they are."""

_PREFERENCE = 5.0
"""How many times likelier the next token to be chosen is a preferred one than any other [our choice]: of "the red
circle" with "red" and "circle" preferred, one of them is hidden ten times in eleven, not twice in three."""


class HiddenTokens(NamedTuple):
    """A batch of sentences with some tokens hidden.

    Attributes:
        text: ids (B, T), the chosen tokens replaced, and the sentences' own mask.
        covered: (B, T) bool, where a word is hidden. There stands [MASK]; the word's own id in a vocabulary without,
            and who encodes the sentence puts a vector of their own in its place.
        positions: (B, K) int64, where the chosen tokens stand; K is the most that a sentence of T can have.
        targets: (B, K) int64, what stood there.
        valid: (B, K) bool; a sentence of few words fills fewer than K places.
    """

    text: Text
    covered: Tensor
    positions: Tensor
    targets: Tensor
    valid: Tensor


class TokenHider:
    """Chooses tokens of sentences and hides them.

    Of the n tokens of a sentence that are not special, max(1, round(share * n)) are chosen, all alike likely, as
    BERT's own data are made, unless some are preferred. That number depends on the sentence alone, so shapes are
    static: nothing waits for the device.

    Args:
        tokenizer: whose special tokens are never chosen.
        share: of the tokens, above 0 and at most 1.
        scheme: "90/10" (ovr-cnn's, whose masking MagNet took: [MASK] or unchanged) or "80/10/10" (BERT's: [MASK], a
            random token, or unchanged).
        preferred: ids of ordinary tokens that are chosen first, mostly: each next token is drawn from those left, one
            of these with five times the chance of another [our choice].

    Raises:
        ValueError: an unknown scheme, a share out of range, or a preferred id that is none of an ordinary token.
    """

    def __init__(
        self,
        tokenizer: ExpressionTokenizer,
        share: float = 0.15,
        scheme: str = "90/10",
        preferred: Collection[int] = (),
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
        self.tokenizer, self.mask_id, self.share, self.scheme = tokenizer, tokenizer.mask_id, share, scheme
        ordinary = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device="cpu")
        ordinary[list(tokenizer.vocabulary.values())] = True
        ordinary[list(tokenizer.special_ids.values())] = False
        self._ordinary = ordinary  # (vocabulary,)
        self._ordinary_ids = ordinary.nonzero()[:, 0]
        wrong = [index for index in preferred if not (0 <= index < len(ordinary) and ordinary[index])]
        if wrong:
            raise ValueError(f"preferred: expected ids of ordinary tokens of {tokenizer.source}, got {wrong[0]}")
        self._exponents: Tensor | None = None  # (vocabulary,)
        if preferred:
            self._exponents = torch.ones(len(ordinary), device="cpu")
            self._exponents[list(preferred)] = 1 / _PREFERENCE

    @property
    def ordinary_words(self) -> int:
        """Entries of the vocabulary that may be chosen."""
        return len(self._ordinary_ids)

    def __call__(self, text: Text, generator: torch.Generator | None = None) -> HiddenTokens:
        """Hide tokens of a batch (B, T) as the tokenizer makes it.

        Args:
            text: ids and mask, on one device.
            generator: where every choice comes from, on the same device; default torch's own of that device.
        """
        ids, device, words = text.ids, text.ids.device, text.ids.shape[1]
        if generator is not None and generator.device.type != device.type:
            raise ValueError(f"generator is on {generator.device}, the text on {device}; expected the same device")
        candidates = self._candidates(text)
        count = candidates.sum(dim=1, keepdim=True)  # (B, 1)
        wanted = torch.where(count > 0, (self.share * count + 0.5).floor().clamp(min=1), 0)
        most = max(1, math.floor(self.share * words + 0.5))
        # The first of the candidates in a random order: those with the largest random numbers.
        lottery = torch.rand(ids.shape, device=device, generator=generator)
        if self._exponents is not None:  # u^(1/w): a draw without replacement by weight (Efraimidis and Spirakis, 2006)
            lottery = lottery.pow(self._exponents[ids])
        lottery = lottery.masked_fill(~candidates, -1.0)
        positions = lottery.topk(most, dim=1).indices
        valid = torch.arange(most, device=device) < wanted
        targets = ids.gather(1, positions)

        masked, randomised = SCHEMES[self.scheme]
        fate = torch.rand(positions.shape, device=device, generator=generator)
        other = torch.randint(len(self._ordinary_ids), positions.shape, device=device, generator=generator)
        behind = valid & (fate < masked)
        covered = torch.zeros_like(text.mask).scatter(1, positions, behind)
        replaced = targets if self.mask_id is None else torch.where(fate < masked, self.mask_id, targets)
        replaced = torch.where((fate >= masked) & (fate < masked + randomised), self._ordinary_ids[other], replaced)
        hidden = ids.scatter(1, positions, torch.where(valid, replaced, targets))
        return HiddenTokens(Text(hidden, text.mask), covered, positions, targets, valid)

    def one_by_one(self, text: Text) -> tuple[Tensor, HiddenTokens]:
        """Every sentence as often as it has ordinary tokens, each time another of them hidden, and really hidden.

        Nothing is drawn, and there is one position a row, K = 1. It waits for the device: the number of rows is the
        number of tokens.

        Args:
            text: ids and mask (B, T), on one device.

        Returns:
            rows: (N,) int64, which sentence each is; in order, and in a sentence by position.
            hidden: N rows.
        """
        rows, places = self._candidates(text).nonzero(as_tuple=True)
        ids, mask, positions = text.ids[rows], text.mask[rows], places[:, None]
        targets = ids.gather(1, positions)
        covered = torch.zeros_like(mask).scatter(1, positions, True)
        if self.mask_id is not None:
            ids = ids.scatter(1, positions, self.mask_id)
        return rows, HiddenTokens(Text(ids, mask), covered, positions, targets, torch.ones_like(covered[:, :1]))

    def _candidates(self, text: Text) -> Tensor:
        """(B, T) bool: the tokens that may be chosen."""
        if self._ordinary.device != text.ids.device:
            device = text.ids.device
            self._ordinary, self._ordinary_ids = self._ordinary.to(device), self._ordinary_ids.to(device)
            self._exponents = None if self._exponents is None else self._exponents.to(device)
        return self._ordinary[text.ids] & text.mask
