"""Expressions to token ids: BERT's WordPiece, CLIP's byte pairs, or any transformers tokenizer of BERT's kind."""

from __future__ import annotations

import os

from magnet_fast.data.tokenizers.base import ExpressionTokenizer, Reading, shortened
from magnet_fast.data.tokenizers.clip import ClipTokenizer
from magnet_fast.data.tokenizers.pretrained import PretrainedTokenizer
from magnet_fast.data.tokenizers.wordpiece import Tokenizer

__all__ = [
    "ClipTokenizer", "ExpressionTokenizer", "PretrainedTokenizer", "Reading", "Tokenizer",
    "open_tokenizer", "shortened",
]  # fmt: skip


def open_tokenizer(
    name: str = "wordpiece", vocabulary: str | os.PathLike[str] | None = None, max_tokens: int = 20
) -> ExpressionTokenizer:
    """The tokenizer that an `InputSpec` names.

    Args:
        name: "wordpiece", "clip", or name or folder of a transformers tokenizer.
        vocabulary: where it is stored. None: for "wordpiece" the one that ships with the package, for a transformers
            tokenizer what its name says; CLIP's does not ship and must be given.
        max_tokens: T, special tokens included.

    Raises:
        FileNotFoundError, ValueError: a vocabulary that is absent or cannot be used.
    """
    if name == "wordpiece":
        return Tokenizer(vocabulary, max_tokens)
    if name == "clip":
        if vocabulary is None:
            raise ValueError(
                "vocabulary: CLIP's does not ship with this package; pass the path of bpe_simple_vocab_16e6.txt.gz "
                "(it is also inside the open_clip_torch package), or a folder with CLIP's vocab.json and merges.txt"
            )
        return ClipTokenizer(vocabulary, max_tokens)
    return PretrainedTokenizer(name if vocabulary is None else vocabulary, max_tokens)
