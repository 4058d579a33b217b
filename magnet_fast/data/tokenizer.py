"""WordPiece tokenizer for expressions, in BERT's manner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch

_SHIPPED_VOCABULARY = Path(__file__).with_name("vocab.txt")
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Tokenizer:
    """Lower-casing WordPiece: expressions to ids with BERT's [CLS] and [SEP].

    vocab: None for the small vocabulary that ships with the package; else the path of a vocab.txt (one token
    per line, its id the line number), of a tokenizer.json, or of a folder that holds either (as Hugging
    Face's bert-base-uncased does). [PAD] must have id 0.
    max_words: length T of every row, [CLS] and [SEP] included. What is longer is cut to its first T ids, so
    that [SEP] goes as well: the released LAVT and MagNet do so.

    Instances can be pickled. Raises FileNotFoundError or ValueError for a vocabulary that cannot be used.
    """

    def __init__(self, vocab: str | os.PathLike[str] | None = None, max_words: int = 20) -> None:
        if isinstance(max_words, bool) or not isinstance(max_words, int):
            raise TypeError(f"max_words is {max_words!r}; expected an int")
        if max_words < 3:
            raise ValueError(f"max_words is {max_words}; expected at least 3 ([CLS], a word, [SEP])")
        self.max_words = max_words
        self.vocab_path = _find_vocabulary(vocab)
        self._tokenizer = _load(self.vocab_path)
        ids = {token: self._tokenizer.token_to_id(token) for token in _SPECIAL_TOKENS}
        missing = [token for token, index in ids.items() if index is None]
        if missing:
            raise ValueError(f"{self.vocab_path} lacks {', '.join(missing)}; expected a BERT vocabulary")
        if ids["[PAD]"] != 0:
            raise ValueError(f"{self.vocab_path} gives [PAD] id {ids['[PAD]']}; expected 0")
        self._begin, self._end = ids["[CLS]"], ids["[SEP]"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the size of an embedding table for them."""
        return self._tokenizer.get_vocab_size()

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of BERT's special tokens, those that the vocabulary has."""
        ids = {token: self._tokenizer.token_to_id(token) for token in (*_SPECIAL_TOKENS, "[MASK]")}
        return {token: index for token, index in ids.items() if index is not None}

    def __call__(self, expressions: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """One or N expressions -> input_ids and attention_mask, both int64 (N, max_words), padded with 0.

        Raises TypeError for what is no text, ValueError for an empty or blank expression, naming its
        position.
        """
        if isinstance(expressions, str):
            expressions = [expressions]
        for position, text in enumerate(expressions):
            if not isinstance(text, str):
                raise TypeError(f"expression {position} is a {type(text).__name__}; expected str")
            if not text.strip():
                raise ValueError(f"expression {position} is empty: {text!r}")
        input_ids = torch.zeros(len(expressions), self.max_words, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, text in enumerate(expressions):
            # One by one: encode_batch starts threads, after which forked data loader workers may lock up.
            ids = [self._begin, *self._tokenizer.encode(text, add_special_tokens=False).ids, self._end]
            ids = ids[: self.max_words]
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask


def _find_vocabulary(vocab: str | os.PathLike[str] | None) -> Path:
    path = _SHIPPED_VOCABULARY if vocab is None else Path(vocab)
    if path.is_dir():
        for name in ("vocab.txt", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"vocab folder {path} holds neither vocab.txt nor tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"vocab {path} does not exist; expected a vocab.txt, a tokenizer.json or their folder")
    return path


def _load(path: Path) -> tokenizers.Tokenizer:
    if path.suffix == ".json":
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    try:
        # Not splitlines: BERT's vocabularies hold characters that it takes for line ends.
        tokens = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a vocabulary in UTF-8: {error}") from error
    if tokens[-1] == "":
        tokens.pop()
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ValueError(f"{path} holds the token {twice!r} twice; expected one id per token")
    if "[UNK]" not in ids:
        raise ValueError(f"{path} lacks [UNK]; expected a BERT vocabulary, one token per line")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return tokenizer
