"""What every tokenizer of expressions does alike: checks, rows of one length, a digest of the vocabulary."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from magnet_fast.models.contract import Text


class ExpressionTokenizer(ABC):
    """Expressions to ids, every row `max_tokens` long. Instances can be pickled.

    Attributes:
        max_tokens: T, the special tokens included; what is longer is cut.
        padding_id: what fills a row behind its tokens.
        mask_id: the token that stands for a hidden word, BERT's [MASK]; None for a vocabulary without.
    """

    padding_id: int = 0
    mask_id: int | None = None

    def __init__(self, max_tokens: int) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            raise TypeError(f"max_tokens is {max_tokens!r}; expected an int")
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; expected at least 3 (start, a word, end)")
        self.max_tokens = max_tokens

    def __call__(self, expressions: str | Sequence[str]) -> Text:
        """One or N expressions -> ids (N, T) int64 and mask (N, T) bool.

        Raises:
            TypeError: an expression is no text.
            ValueError: one is empty or blank. Both name its position.
        """
        if isinstance(expressions, str):
            expressions = [expressions]
        for position, text in enumerate(expressions):
            if not isinstance(text, str):
                raise TypeError(f"expression {position} is a {type(text).__name__}; expected str")
            if not text.strip():
                raise ValueError(f"expression {position} is empty: {text!r}")
        ids = torch.full((len(expressions), self.max_tokens), self.padding_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(expressions):
            # One by one: encoding a batch starts threads, after which forked data loader workers may lock up.
            found = self._encode(text)
            ids[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = True
        return Text(ids, mask)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """At most `max_tokens` ids of one expression, special tokens included."""

    @property
    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id."""

    @property
    @abstractmethod
    def special_ids(self) -> dict[str, int]:
        """Ids of the tokens that are no part of a sentence, by their names."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The file, folder or name that the vocabulary comes from, for messages."""

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table for the ids needs."""
        return max(self.vocabulary.values()) + 1

    def digest(self) -> str:
        """SHA-256 of the tokens in the order of their ids: the same in whichever file format they are stored."""
        return digest_of(self._tokens())

    def matches(self, digest: str) -> bool:
        """Whether a checkpoint that keeps `digest` was trained with this vocabulary."""
        return digest == self.digest()

    def _tokens(self) -> list[str]:
        ids = self.vocabulary
        return sorted(ids, key=ids.__getitem__)


def digest_of(tokens: Sequence[str]) -> str:
    """SHA-256 of tokens, one a line."""
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()
