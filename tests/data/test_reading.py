"""What a tokenizer cannot read of a sentence: said once, kept with the ids, and refused where nothing is left."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch

from magnet_fast.data import ExpressionDataset, MixedDataset, Refer, Tokenizer
from magnet_fast.data.tokenizers import ClipTokenizer, ExpressionTokenizer, PretrainedTokenizer

from .layout import small_ref, write_root
from .vocabularies import GOLDEN_CLIP, save_roberta


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_roberta(tmp_path_factory.mktemp("tokenizers") / "roberta")


@pytest.fixture(params=["wordpiece", "clip", "roberta"])
def tokenizer(request: pytest.FixtureRequest, roberta: str) -> ExpressionTokenizer:
    if request.param == "wordpiece":
        return Tokenizer(max_tokens=8)
    return ClipTokenizer(GOLDEN_CLIP, 8) if request.param == "clip" else PretrainedTokenizer(roberta, 8)


def read(tokenizer: ExpressionTokenizer, text: str):
    return tokenizer.readings([text])[0]


def test_what_is_read_whole_is_complete(tokenizer: ExpressionTokenizer) -> None:
    reading = read(tokenizer, "the red")
    assert reading.complete and reading.notes == {}
    assert torch.equal(tokenizer.rows([reading]).ids, tokenizer("the red").ids)


def test_cut(tokenizer: ExpressionTokenizer) -> None:
    reading = read(tokenizer, "the small red star above the blue box on the left")
    assert reading.cut and not reading.complete and len(reading.ids) == 8
    assert reading.notes == {"cut": "it is cut after 8 tokens"}


def test_the_end_token_alone_is_no_loss() -> None:
    """The released models' tokenizer cuts [SEP] off first."""
    six, seven, eight = (read(Tokenizer(max_tokens=8), " ".join(["red"] * n)).cut for n in (6, 7, 8))
    assert (six, seven, eight) == (False, False, True)


def test_unknown_words() -> None:
    reading = read(Tokenizer(), "the красный circle 東京 and the красный box")
    assert reading.unknown == ("красный", "東京") and not (reading.cut or reading.none_known)
    assert reading.notes == {"unknown": "the vocabulary lacks 'красный', '東京'"}
    reading = read(Tokenizer(), "красный круг")
    assert reading.none_known and "lacks all its words: 'красный', 'круг'" in reading.notes["unknown"]


def test_bytes_know_every_word(roberta: str) -> None:
    for tokenizer in (ClipTokenizer(GOLDEN_CLIP, 60), PretrainedTokenizer(roberta, 60)):
        assert read(tokenizer, "красный 東京 \N{GRINNING FACE}").complete


@pytest.mark.parametrize("text", ["\u200b", "\u200b\ufeff \u2060", "\x00\x1b", "\u0301", "\ud800", "\udcff \udcfe"])
def test_nothing_left_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^expression 1 leaves no word to read: the tokenizer drops all of '"
    ) as found:
        Tokenizer()(["red", text])
    str(found.value).encode()  # it can be printed


def test_halves_alone_are_nothing_to_any_tokenizer(tokenizer: ExpressionTokenizer) -> None:
    with pytest.raises(ValueError, match="expression 0 leaves no word to read"):
        tokenizer("\ud800 \udfff")


def test_characters_that_are_dropped() -> None:
    reading = read(Tokenizer(), "the\u200b red\x00 circle\tleft \ufffd")
    assert reading.dropped == ("\u200b", "\x00", "\ufffd")
    assert reading.notes["dropped"].startswith("characters are left out: '\\u200b', '\\x00'")
    assert reading.ids == read(Tokenizer(), "the red circle left").ids


def test_halves_of_surrogate_pairs(tokenizer: ExpressionTokenizer) -> None:
    assert read(tokenizer, "red \ud83d circle").dropped == ("\ud83d",)
    pair = read(tokenizer, "red \ud83d\ude00")
    assert pair.ids == read(tokenizer, "red \N{GRINNING FACE}").ids and pair.dropped == ()


def test_each_kind_of_loss_is_said_once(tokenizer: ExpressionTokenizer) -> None:
    long, broken = "the small red star above the blue box", "red \ud800 star"
    with pytest.warns(UserWarning) as said:
        tokenizer([long, "red", long])
    assert len(said) == 1 and f"expression '{long}': it is cut after 8 tokens; said once" in str(said[0].message)
    with pytest.warns(UserWarning, match=r"characters are left out: '\\ud800'"):
        tokenizer(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([long, broken])
        pickle.loads(pickle.dumps(tokenizer))(long)


@pytest.mark.parametrize("letters", ["a", "東", "! ", "red "])
def test_a_million_letters_are_cut_before_they_are_read(tokenizer: ExpressionTokenizer, letters: str) -> None:
    seen = []
    encode = tokenizer._encode
    tokenizer._encode = lambda text: seen.append(len(text)) or encode(text)
    assert read(tokenizer, letters * (1_000_000 // len(letters))).cut
    assert max(seen) == 10_000


def dataset(folder: Path, *sentences: str) -> ExpressionDataset:
    root = write_root(folder / "root", refs=[small_ref(5, 70, 7, *sentences)])
    return ExpressionDataset(Refer(root), "train", Tokenizer(), 16)


def test_data_sets_name_the_sentence_of_which_nothing_is_left(tmp_path: Path) -> None:
    for number, text in enumerate(("\u200b", "\ud800", "\x00\x01")):
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p: ref_id 5, sent_id 51: .*leaves no word to read"):
            dataset(tmp_path / str(number), "the man", text)
    assert len(dataset(tmp_path / "marks", "the man", "?!")) == 2


def test_data_sets_say_once_what_is_not_read(tmp_path: Path) -> None:
    found = dataset(tmp_path, "the man", "красный", "東京", "left " * 30)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        for index in range(4):
            found[index]
    assert len(said) == 1
    assert "ref_id 5, sent_id 51: sentence 'красный': the vocabulary lacks all its words: " in str(said[0].message)


def test_data_sets_count_what_is_not_read(tmp_path: Path) -> None:
    found = dataset(tmp_path, "the man", "красный", "東京", "left " * 30)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        MixedDataset([found]).tell_unread()
        found.tell_unread()
        found[1]
    assert len(said) == 1
    message = str(said[0].message)
    assert (
        "train: of 4 sentences 2 have words that the tokenizer does not know (the first: ref_id 5, sent_id 51:"
        in message
    )
    assert "; 1 are cut at its length (the first: ref_id 5, sent_id 53: it is cut after 20 tokens)" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset(tmp_path / "other", "the man", "красный").tell_unread(1)
