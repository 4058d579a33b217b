"""Which words of the scenes' sentences say what: a colour, a shape, a size, a texture or a place.

All other words are function words, and nouns that tell nothing ("object", "side").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from magnet_fast.data.scenes.drawing import COLOURS, SHAPES
from magnet_fast.data.scenes.wording import PLURALS, SHAPE_WORDS, SIZE_WORDS, TEXTURE_TAILS, TEXTURE_WORDS
from magnet_fast.data.scenes.writing import MANIFEST
from magnet_fast.data.tokenizers.base import ExpressionTokenizer

ATTRIBUTES = ("colour", "shape", "size", "texture")
"""Kinds that describe what is named; a shape's word is the head of its phrase."""

KINDS = (*ATTRIBUTES, "place", "function")
"""All kinds, in the order of tables."""

_PLACE_WORDS = (
    *("left", "right", "top", "bottom", "upper", "lower", "middle", "center", "far", "farthest"),
    *("leftmost", "rightmost", "topmost", "highest", "bottommost", "lowest"),
    *("above", "over", "below", "under", "beneath"),
    *("next", "beside", "near", "close", "closest", "nearest", "furthest"),
    *("first", "second", "third", "fourth"),
)


def _of_kind(kind: str, groups: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: kind for words in groups.values() for word in words}


WORD_KINDS: Mapping[str, str] = {
    **{word: "colour" for word in COLOURS},
    **{word: "shape" for word in SHAPES},
    **_of_kind("shape", SHAPE_WORDS),
    **_of_kind("shape", PLURALS),
    **_of_kind("size", SIZE_WORDS),
    **_of_kind("texture", TEXTURE_WORDS),
    **{tail.split()[-1]: "texture" for tail in TEXTURE_TAILS.values()},
    **{word: "place" for word in _PLACE_WORDS},
}
"""Word -> kind; a word that is not in it is a function word."""


def are_scenes(root: Path) -> bool:
    """Whether a folder of data holds embedded scenes, as `write_scenes` leaves them."""
    return (root / MANIFEST).is_file()


def kinds_of_ids(tokenizer: ExpressionTokenizer, words: Mapping[str, str] = WORD_KINDS) -> dict[int, str]:
    """Id -> kind of the words' tokens.

    The pieces of a word that a vocabulary splits are of its kind, those that words of several kinds share of none.
    What the vocabulary lacks is left out.
    """
    special = set(tokenizer.special_ids.values())
    found: dict[int, set[str]] = {}
    for word, kind in words.items():
        for index in tokenizer.readings([word])[0].ids:
            if index not in special:
                found.setdefault(index, set()).add(kind)
    return {index: min(kinds) for index, kinds in found.items() if len(kinds) == 1}
