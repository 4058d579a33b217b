"""CLIP's byte-pair tokenizer, as CRIS uses it."""

from __future__ import annotations

import gzip
import html
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from magnet_fast.data.tokenizers.base import ExpressionTokenizer, Reading, check_ids, native
from magnet_fast.models.contract import Text

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_LARGEST = 1 << 26  # bytes; CLIP's has 3 million
_MERGES = 49152 - 256 - 2  # CLIP reads so many of its file's 262,144 lines
_FILES = "bpe_simple_vocab_16e6.txt.gz, vocab.json with merges.txt, or tokenizer.json"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer(ExpressionTokenizer):
    """CLIP's lower-cased byte pairs between its start and end tokens, padded with 0 as CRIS pads them.

    A longer sentence is cut to `max_tokens`, and its last place becomes the end token. The mask is id != 0, as
    released: "!" inside a token has id 0, and counts as padding. HTML entities are undone twice, white space is
    squeezed; the repair of broken encodings by ftfy, which changes no ordinary sentence, is left out.

    Args:
        vocabulary: a file of merges as OpenAI published it (bpe_simple_vocab_16e6.txt, gzipped or not), a
            tokenizer.json, or a folder that holds one of them or vocab.json and merges.txt.
        max_tokens: length T of every row, start and end included; CRIS has 17 (RefCOCO, RefCOCO+) and 22 (G-Ref).

    Raises:
        FileNotFoundError, ValueError: a vocabulary that is absent or cannot be used.
    """

    def __init__(self, vocabulary: str | os.PathLike[str], max_tokens: int = 20) -> None:
        super().__init__(max_tokens)
        self._path = _find_vocabulary(Path(vocabulary))
        ids, merges = _read(self._path)
        missing = [token for token in (*_byte_tokens(), START, END) if token not in ids]
        if missing:
            raise ValueError(
                f"{self._path} lacks {len(missing)} tokens, {missing[0]!r} among them; expected CLIP's vocabulary, "
                "with every byte, inside and at the end of a word, and its start and end tokens"
            )
        self._start, self._end = ids[START], ids[END]
        model = native(
            lambda: tokenizers.models.BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix=_WORD_END),
            f"{self._path}: its merges do not fit its vocabulary",
        )
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def rows(self, readings: Sequence[Reading]) -> Text:
        """As every tokenizer, with mask = ids != 0."""
        ids, _ = super().rows(readings)
        return Text(ids, ids != self.padding_id)

    @property
    def source(self) -> str:
        """Path of the vocabulary."""
        return str(self._path)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id."""
        return self._tokenizer.get_vocab()

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of the start and the end token."""
        return {START: self._start, END: self._end}

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def _encode(self, text: str) -> tuple[list[int], bool]:
        text = html.unescape(html.unescape(text)).strip()
        words = native(lambda: self._tokenizer.encode(text, add_special_tokens=False).ids, f"{self._path}: encoding")
        return [self._start, *words[: self.max_tokens - 2], self._end], len(words) > self.max_tokens - 2


def _byte_tokens() -> list[str]:
    """A printable character for each of the 256 bytes, in CLIP's order of ids, then each at the end of a word."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [256 + place for place in range(256 - len(printable))]
    characters = [chr(code) for code in printable + others]
    return [*characters, *(character + _WORD_END for character in characters)]


def _find_vocabulary(path: Path) -> Path:
    names = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "vocab.json", "tokenizer.json")
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"vocabulary folder {path} holds nothing of CLIP's; expected {_FILES}")
    if not path.is_file():
        raise FileNotFoundError(f"vocabulary {path} does not exist; expected {_FILES}, or their folder")
    return path


def _read(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the tokens, and merges in their order."""
    try:
        if path.suffix != ".json":
            merges = _merges_of(_text(path))
            tokens = [*_byte_tokens(), *("".join(pair) for pair in merges), START, END]
            return {token: index for index, token in enumerate(tokens)}, merges
        content = json.loads(_text(path))
        if path.name == "vocab.json":
            merges = _merges_of(_text(path.with_name("merges.txt")))
            return _ids(content), merges
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
        ids = _ids(content["model"]["vocab"])
        ids |= _ids({one["content"]: one["id"] for one in content.get("added_tokens", ())})
        return ids, [(left, right) for left, right in pairs]
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path} is not CLIP's vocabulary ({error}); expected {_FILES}") from error


def _text(path: Path) -> str:
    if path.suffix != ".gz":
        return path.read_bytes().decode("utf-8")
    with gzip.open(path) as file:
        content = file.read(_LARGEST + 1)  # a few bytes may unpack to any number
    if len(content) > _LARGEST:
        raise ValueError(f"expected at most {_LARGEST} bytes, unpacked, got more")
    return content.decode("utf-8")


def _merges_of(text: str) -> list[tuple[str, str]]:
    """The pairs of a file of merges, whose first line is a title."""
    lines = [line.strip() for line in text.split("\n")[1:]]
    pairs = [line.split() for line in lines if line][:_MERGES]
    wrong = [pair for pair in pairs if len(pair) != 2]
    if wrong:
        raise ValueError(f"a line of merges is {' '.join(wrong[0])!r:.80}, expected two tokens")
    return [(left, right) for left, right in pairs]


def _ids(content: Any) -> dict[str, int]:
    if not isinstance(content, dict):
        raise ValueError("it holds no dict of tokens and ids")
    check_ids(content.values(), "its vocabulary")
    return dict(content)
