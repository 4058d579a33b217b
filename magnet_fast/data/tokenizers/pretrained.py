"""The tokenizer that belongs to a transformers text encoder of BERT's kind, by name or folder."""

from __future__ import annotations

import os

from magnet_fast.data.tokenizers.base import ExpressionTokenizer


class PretrainedTokenizer(ExpressionTokenizer):
    """A transformers tokenizer with its own special tokens and its own padding.

    What is longer than `max_tokens` is cut as the tokenizer cuts it: its end token stays.

    Args:
        name: a local folder, or a name that transformers knows.
        max_tokens: length T of every row, special tokens included.

    Raises:
        ValueError: transformers finds no tokenizer there, or it has no padding token.
    """

    def __init__(self, name: str | os.PathLike[str], max_tokens: int = 20) -> None:
        super().__init__(max_tokens)
        from transformers import AutoTokenizer  # seconds, which the other tokenizers need not wait for

        self._name = os.fspath(name)
        try:
            local = os.path.isdir(self._name)
            tokenizer = AutoTokenizer.from_pretrained(self._name, local_files_only=local, trust_remote_code=False)
        except Exception as error:  # transformers and the hub raise many kinds
            reason = str(error).split("\n", 1)[0]
            raise ValueError(f"tokenizer: transformers finds no tokenizer {self._name!r}: {reason}") from error
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer: {self._name!r} has no padding token; expected one of BERT's kind")
        self.padding_id, self.mask_id = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.unknown_id = tokenizer.unk_token_id
        self._special_ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._vocabulary = tokenizer.get_vocab()
        self._tokenizer = tokenizer
        if tokenizer.is_fast:  # without the wrapper, which encodes by batches and cannot always be pickled
            self._tokenizer = tokenizer.backend_tokenizer
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(max_tokens)

    @property
    def source(self) -> str:
        """Name or folder."""
        return self._name

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id."""
        return self._vocabulary

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of the tokenizer's special tokens, by its own names for them."""
        return self._special_ids

    def _encode(self, text: str) -> tuple[list[int], bool]:
        if hasattr(self._tokenizer, "enable_truncation"):
            found = self._tokenizer.encode(text)
            return found.ids, bool(found.overflowing)
        ids = self._tokenizer.encode(text, truncation=True, max_length=self.max_tokens)
        return ids, len(ids) == self.max_tokens < len(self._tokenizer.encode(text))
