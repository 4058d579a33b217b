"""The kinds of the scenes' words against the sentences that the generator makes, slot by slot."""

from __future__ import annotations

from pathlib import Path

import pytest

from magnet_fast.data import ExpressionDataset, MixedDataset, Refer, Tokenizer
from magnet_fast.data.scenes import describe_scene, write_scenes
from magnet_fast.data.scenes.word_kinds import ATTRIBUTES, KINDS, WORD_KINDS, kinds_of_ids
from magnet_fast.data.tokenizers import ClipTokenizer

from .vocabularies import GOLDEN_CLIP

SAYING_NOTHING = {"object", "objects", "shape", "shapes", "thing", "things"}


def test_words_are_of_the_kind_of_their_slot() -> None:
    seen: dict[str, set[str]] = {}
    for number in range(120):
        for referent in describe_scene(3, number, "hard", "train", 64, several=3).referents:
            for expression in referent.expressions:
                for part in expression.parts:
                    slot = part.slot.split()[-1]
                    words = set(part.phrase.split())
                    kinds = {WORD_KINDS.get(word, "function") for word in words}
                    seen.setdefault(slot, set()).update(words)
                    if slot in ATTRIBUTES:
                        assert kinds - {"function"} == ({slot} if words.isdisjoint(SAYING_NOTHING) else set()), part
                    elif slot in ("place", "rank", "side", "relation"):
                        assert "place" in kinds and kinds <= {"place", "function"}, part
                    else:
                        assert kinds == {"function"}, part
    assert {"colour", "shape", "size", "texture", "place", "rank", "side", "relation", "article"} <= set(seen)
    function = {word for words in seen.values() for word in words if word not in WORD_KINDS}
    assert function <= SAYING_NOTHING | {
        "the", "on", "in", "at", "to", "of", "from", "with", "away", "very", "side", "half", "corner", "counting",
        "and", "all", "both", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    }  # fmt: skip
    assert set(WORD_KINDS.values()) == set(KINDS) - {"function"}


def test_kinds_of_tokens() -> None:
    tokenizer = Tokenizer()
    found = kinds_of_ids(tokenizer)
    assert {word: found[tokenizer.vocabulary[word]] for word in WORD_KINDS} == WORD_KINDS  # one token a word
    # A word in pieces: all are of its kind, those that kinds share of none.
    pieces = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "##dish", "blue", "##ring"])
    words = {"red": "colour", "reddish": "colour", "bluering": "shape", "blue": "colour", "moon": "shape"}
    assert kinds_of_ids(pieces, words) == {4: "colour", 5: "colour", 7: "shape"}
    clip = ClipTokenizer(GOLDEN_CLIP)
    text = clip(["red"])
    own = set(text.ids[text.mask].tolist()) - set(clip.special_ids.values())
    assert own and kinds_of_ids(clip, {"red": "colour"}) == dict.fromkeys(own, "colour")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 4, 3, image_size=64))


def test_scenes_know_their_words_and_other_data_do_not(scenes: Path, tmp_path: Path) -> None:
    known = ExpressionDataset(Refer(scenes), "val", Tokenizer(), 64)
    assert known.word_kinds == WORD_KINDS
    for folder in ("refcoco", "images"):
        (tmp_path / folder).symlink_to(scenes / folder)  # the same files as somebody's own data
    own = ExpressionDataset(Refer(tmp_path), "val", Tokenizer(), 64)
    assert own.word_kinds == {}
    assert MixedDataset([known, known]).word_kinds == WORD_KINDS and MixedDataset([known, own]).word_kinds == {}
