"""WordPiece tokenizer for expressions, in BERT's manner."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from magnet_fast.data.tokenizers.base import ExpressionTokenizer, check_ids, digest_of, native

SHIPPED_VOCABULARY = Path(__file__).parent.with_name("vocab.txt")
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


_SMALL = 4000
"""Entries: a larger vocabulary is trained on much text, and a word's parts in it mean something to the model."""


class Tokenizer(ExpressionTokenizer):
    """Lower-casing WordPiece: expressions to ids with BERT's [CLS] and [SEP], padded with 0.

    What is longer than `max_tokens` is cut to its first T ids, so that [SEP] goes as well: the released LAVT and MagNet
    do so.

    Args:
        vocabulary: None for the small vocabulary that ships with the package; else the path of a vocab.txt (one token
            per line, its id the line number), of a tokenizer.json, or of a folder that holds either (as Hugging Face's
            bert-base-uncased does); or the tokens themselves, in the order of their ids. [PAD] must have id 0.
        max_tokens: length T of every row, [CLS] and [SEP] included.

    Raises:
        FileNotFoundError, ValueError: a vocabulary that is absent or cannot be used.
    """

    def __init__(self, vocabulary: str | os.PathLike[str] | Sequence[str] | None = None, max_tokens: int = 20) -> None:
        super().__init__(max_tokens)
        if vocabulary is None or isinstance(vocabulary, str | os.PathLike):
            path = _find_vocabulary(vocabulary)
            self._source, self._tokenizer = str(path), _load(path)
        else:
            self._source = f"a list of {len(vocabulary)} tokens"
            self._tokenizer = _of_tokens(vocabulary, self._source)
        ids = {token: self._tokenizer.token_to_id(token) for token in _SPECIAL_TOKENS}
        missing = [token for token, index in ids.items() if index is None]
        if missing:
            raise ValueError(f"{self._source} lacks {', '.join(missing)}; expected a BERT vocabulary")
        if ids["[PAD]"] != 0:
            raise ValueError(f"{self._source} gives [PAD] id {ids['[PAD]']}; expected 0")
        self._begin, self._end = ids["[CLS]"], ids["[SEP]"]
        entries = self._tokenizer.get_vocab()
        letters = [token for token in entries if len(token.removeprefix("##")) == 1 and token[-1].isalpha()]
        self._letters = frozenset(entries[token] for token in letters if len(entries) < _SMALL)
        self.mask_id, self.unknown_id = self._tokenizer.token_to_id("[MASK]"), ids["[UNK]"]

    @property
    def source(self) -> str:
        """Path of the vocabulary, or what it is called."""
        return self._source

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id."""
        return self._tokenizer.get_vocab()

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of BERT's special tokens, those that the vocabulary has."""
        ids = {token: self._tokenizer.token_to_id(token) for token in (*_SPECIAL_TOKENS, "[MASK]")}
        return {token: index for token, index in ids.items() if index is not None}

    def matches(self, digest: str) -> bool:
        """Whether a checkpoint that keeps `digest` was trained with this vocabulary.

        Checkpoints written before the digest followed the ids keep one of the vocabulary's lines, told apart at
        characters such as U+2028 that a token may hold, and stripped; it is accepted, too.
        """
        return super().matches(digest) or digest == digest_of(
            [token.strip() for token in "\n".join(self._tokens()).splitlines()]
        )

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def _encode(self, text: str) -> tuple[list[int], bool]:
        found = native(lambda: self._tokenizer.encode(text, add_special_tokens=False).ids, f"{self._source}: encoding")
        ids = [self._begin, *found, self._end]
        return ids[: self.max_tokens], len(ids) > self.max_tokens + 1  # the end token alone is no loss

    def _spelled(self, text: str, ids: list[int]) -> tuple[str, ...]:
        if self._letters.isdisjoint(ids):
            return ()
        read = self._tokenizer.encode(text, add_special_tokens=False)
        places: dict[int, list[int]] = {}
        for place, word in enumerate(read.word_ids[: self.max_tokens]):
            places.setdefault(word, []).append(place)
        found = []
        for own in places.values():
            alone = [read.ids[place] in self._letters for place in own]
            word = text[read.offsets[own[0]][0] : read.offsets[own[-1]][1]]
            # One letter alone may be an ending, as in "square ##s".
            if len(own) > 1 and word.isalpha() and (alone[0] or sum(alone) > 1):
                found.append(word)
        return tuple(dict.fromkeys(found))


def _find_vocabulary(vocabulary: str | os.PathLike[str] | None) -> Path:
    path = SHIPPED_VOCABULARY if vocabulary is None else Path(vocabulary)
    if path.is_dir():
        for name in ("vocab.txt", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"vocabulary folder {path} holds neither vocab.txt nor tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"vocabulary {path} does not exist; expected a vocab.txt, a tokenizer.json or their folder"
        )
    return path


def read_tree(path: Path) -> str:
    """The text of a tokenizer.json, of which the ids are looked at: the library allocates by them."""
    content = path.read_bytes()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {type(error).__name__}: {error}") from error
    tree = tree if isinstance(tree, dict) else {}
    inner = tree.get("model")
    for table in (inner.get("vocab") if isinstance(inner, dict) else None, tree.get("added_tokens")):
        if isinstance(table, dict):
            check_ids(table.values(), str(path))
        elif isinstance(table, list):
            check_ids((one["id"] for one in table if isinstance(one, dict) and "id" in one), str(path))
    return content.decode("utf-8-sig")


def _load(path: Path) -> tokenizers.Tokenizer:
    if path.suffix == ".json":
        content = read_tree(path)
        tokenizer = native(lambda: tokenizers.Tokenizer.from_str(content), f"{path} is not a tokenizer.json")
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
    return _of_tokens(tokens, str(path))


def _of_tokens(tokens: Sequence[str], what: str) -> tokenizers.Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ValueError(f"{what} holds the token {twice!r} twice; expected one id per token")
    if "[UNK]" not in ids:
        raise ValueError(f"{what} lacks [UNK]; expected a BERT vocabulary, one token per line")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return tokenizer
