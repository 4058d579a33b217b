"""What every tokenizer of expressions does alike: checks, what it cannot read, rows of one length, a digest."""

from __future__ import annotations

import hashlib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

from magnet_fast.models.contract import Text
from magnet_fast.showing import shown

_LONGEST = 10_000  # characters; tokenizers take seconds for a million, of which a model reads some twenty words

_T = TypeVar("_T")
_HALF = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


class Reading(NamedTuple):
    """What a tokenizer makes of one sentence.

    Attributes:
        ids: at most `max_tokens`, special tokens included.
        unknown: its words, told apart by white space, in which the vocabulary has no token for a part or the whole.
        dropped: characters that are left out, each once: controls and characters of no width where the tokenizer drops
            them, and halves of a surrogate pair, which are no text.
        cut: whether it goes on behind the last token.
        none_known: whether no part of what is read has a token: the model cannot tell this sentence from others.
        spelled: its words of which a small vocabulary has little but the letters. They are read, but only a model that
            was trained with them knows what they mean.
    """

    ids: list[int]
    unknown: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    cut: bool = False
    none_known: bool = False
    spelled: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the whole sentence is read."""
        return not (self.unknown or self.dropped or self.cut)

    @property
    def notes(self) -> dict[str, str]:
        """What is not read, or in letters alone, in words, by the name of the attribute that says so."""
        notes = {}
        if self.unknown:
            share = "all its words: " if self.none_known else ""
            notes["unknown"] = f"the vocabulary lacks {share}{_listed(self.unknown)}"
        if self.spelled:
            listed = _listed(self.spelled)
            notes["spelled"] = f"read letter by letter, known only to a model trained with such words: {listed}"
        if self.dropped:
            notes["dropped"] = f"characters are left out: {_listed(self.dropped)}"
        if self.cut:
            notes["cut"] = f"it is cut after {len(self.ids)} tokens"
        return notes


class ExpressionTokenizer(ABC):
    """Expressions to ids, every row `max_tokens` long. Instances can be pickled.

    Attributes:
        max_tokens: T, the special tokens included; what is longer is cut.
        padding_id: what fills a row behind its tokens.
        mask_id: the token that stands for a hidden word, BERT's [MASK]; None for a vocabulary without.
        unknown_id: the token that stands for what the vocabulary lacks; None for one that lacks nothing.
    """

    padding_id: int = 0
    mask_id: int | None = None
    unknown_id: int | None = None

    def __init__(self, max_tokens: int) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            raise TypeError(f"max_tokens is {max_tokens!r}; expected an int")
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; expected at least 3 (start, a word, end)")
        self.max_tokens = max_tokens
        self._told: set[str] = set()

    def __call__(self, expressions: str | Sequence[str]) -> Text:
        """One or N expressions -> ids (N, T) int64 and mask (N, T) bool.

        A warning says once, for each kind of loss, that an expression cannot be read as it is (see `Reading`).

        Raises:
            TypeError, ValueError: as `readings`.
        """
        expressions = [expressions] if isinstance(expressions, str) else expressions
        readings = self.readings(expressions)
        for text, reading in zip(expressions, readings, strict=True):
            self.tell(text, reading)
        return self.rows(readings)

    def readings(self, expressions: Sequence[str]) -> list[Reading]:
        """What is read of each expression, without a warning.

        Raises:
            TypeError: an expression is no text.
            ValueError: one is empty or blank, or nothing of it is left to be read. All name its position.
        """
        # One by one: encoding a batch starts threads, after which forked data loader workers may lock up.
        return [self._reading(text, f"expression {position}") for position, text in enumerate(expressions)]

    def rows(self, readings: Sequence[Reading]) -> Text:
        """N readings -> ids (N, T) int64 and mask (N, T) bool."""
        ids = torch.full((len(readings), self.max_tokens), self.padding_id, dtype=torch.int64, device="cpu")
        mask = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
        for row, reading in enumerate(readings):
            ids[row, : len(reading.ids)] = torch.tensor(reading.ids, device="cpu")
            mask[row, : len(reading.ids)] = True
        return Text(ids, mask)

    def tell(self, text: str, reading: Reading) -> None:
        """Warn of what is not read of a text, once for each kind of loss."""
        fresh = {kind: note for kind, note in reading.notes.items() if kind not in self._told}
        if fresh:
            self._told.update(fresh)
            warnings.warn(
                f"expression {shortened(text)}: {'; '.join(fresh.values())}; said once for each kind of loss",
                stacklevel=3,
            )

    def _reading(self, text: str, name: str) -> Reading:
        if not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__}; expected str")
        if not text.strip():
            raise ValueError(f"{name} is empty: {shortened(text)}")
        kept = _without_halves(text[:_LONGEST])
        ids, cut = self._encode(kept)
        if not (kept.strip() and self._words(ids)):
            raise ValueError(f"{name} leaves no word to read: the tokenizer drops all of {shortened(text)}")
        unknown: tuple[str, ...] = ()
        if self.unknown_id in ids:
            words = dict.fromkeys(kept.split()[: self.max_tokens])
            unknown = tuple(word for word in words if self.unknown_id in self._encode(word)[0]) or (kept,)
        none_known = self._words(ids) == {self.unknown_id}
        dropped = (*dict.fromkeys(_HALF.findall(text[:_LONGEST])), *self._dropped(kept))
        return Reading(ids, unknown, dropped, cut or len(text) > _LONGEST, none_known, self._spelled(kept, ids))

    def _spelled(self, text: str, ids: list[int]) -> tuple[str, ...]:
        """Words of a text, read as `ids`, of which a small vocabulary has little but the letters."""
        return ()

    def _dropped(self, text: str) -> list[str]:
        if text.isprintable() and "\ufffd" not in text:
            return []
        doubtful = [one for one in dict.fromkeys(text) if one == "\ufffd" or not (one.isprintable() or one.isspace())]
        return [one for one in doubtful if not self._words(self._encode(one)[0])]

    @cached_property
    def _frame(self) -> set[int]:
        return set(self.special_ids.values()) - {self.unknown_id}

    def _words(self, ids: list[int]) -> set[int]:
        """Those of the ids that stand for a part of a sentence, be it an unknown one."""
        return set(ids) - self._frame

    @abstractmethod
    def _encode(self, text: str) -> tuple[list[int], bool]:
        """At most `max_tokens` ids of one expression, special tokens included, and whether there were more."""

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

    def to_json(self) -> str | None:
        """A `tokenizer.json` that `open_tokenizer` reads again as this one; None where its name alone stands for it."""
        return None

    def digest(self) -> str:
        """SHA-256 of the tokens in the order of their ids: the same in whichever file format they are stored."""
        return digest_of(self._tokens())

    def matches(self, digest: str) -> bool:
        """Whether a checkpoint that keeps `digest` was trained with this vocabulary."""
        return digest == self.digest()

    def _tokens(self) -> list[str]:
        ids = self.vocabulary
        return sorted(ids, key=ids.__getitem__)


def native(function: Callable[[], _T], what: str) -> _T:
    """What a function of the tokenizers library gives; ValueError, which begins with `what`, for all that it raises:
    it knows no kinds of its own, and a panic of its own is no `Exception`."""
    try:
        return function()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def check_ids(ids: Iterable[Any], what: str) -> None:
    """ValueError for ids of tokens that are no whole numbers from 0 to `MOST_TOKENS`: tables are allocated by them."""
    for one in ids:
        if type(one) is not int or not 0 <= one < MOST_TOKENS:
            raise ValueError(
                f"{what}: expected ids of tokens that are whole numbers below {MOST_TOKENS}, got {shown(one, 40)}"
            )


MOST_TOKENS = 1 << 21
"""Ids of a vocabulary: the largest published ones have some 500,000."""


def digest_of(tokens: Sequence[str]) -> str:
    """SHA-256 of tokens, one a line."""
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()


def shortened(text: str) -> str:
    """A text as messages quote it: on one line, what cannot be printed escaped, and never long."""
    kept = text[:80]
    while len(repr(kept)) > 100:
        kept = kept[: 3 * len(kept) // 4]
    return repr(text if kept == text else f"{kept}…")


def _listed(parts: tuple[str, ...]) -> str:
    more = f" and {len(parts) - 5} more" if len(parts) > 5 else ""
    return ", ".join(map(shortened, parts[:5])) + more


def _without_halves(text: str) -> str:
    """Pairs of surrogates as the characters they stand for; halves of a pair, which no tokenizer takes, left out."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _HALF.sub("", text).encode("utf-16", "surrogatepass").decode("utf-16")
    return text
