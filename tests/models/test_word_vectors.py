"""Files of word vectors, and the encoder that starts from one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import models
from magnet_fast.models.base_weights import base_of
from magnet_fast.models.encoders.word_vectors import read_word_vectors


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_vectors_come_to_their_words(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 5))
    letters = st.text(st.characters(categories=("L", "P", "S")), min_size=1, max_size=4)
    known = data.draw(
        st.dictionaries(letters, st.lists(st.floats(-9, 9, width=32), min_size=width, max_size=width), min_size=1)
    )
    asked = data.draw(st.lists(st.sampled_from([*known, "not there"]), max_size=6)) + [next(iter(known))]
    lines = "".join(f"{word} {' '.join(map(repr, vector))}\n" for word, vector in known.items())
    path = write(tmp_path_factory.mktemp("vectors") / "vectors.txt", lines)
    vectors, found = read_word_vectors(path, asked, width)
    assert vectors.dtype == torch.float32 and vectors.shape == (len(asked), width)
    for word, vector, there in zip(asked, vectors, found, strict=True):
        assert there == (word in known)
        assert np.array_equal(vector.numpy(), np.float32(known.get(word, [0.0] * width)))


def test_forms_in_use(tmp_path: Path) -> None:
    """word2vec's header, fastText's blank at the end of lines, GloVe's words with blanks, a word that stands twice."""
    path = write(tmp_path / "v.txt", "4 2\nthe 1 2 \nat name@domain.com 3 4\nred 5 6\nred 7 8\n\n")
    vectors, found = read_word_vectors(path, ["red", "the", "at name@domain.com"], 2)
    assert vectors.tolist() == [[5, 6], [1, 2], [3, 4]] and found.all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2\n", "line 1: expected a word and 3 numbers, got 'the 1 2'"),
        ("the 1 2 3 4\n", "line 1: it has more than the 3 numbers expected"),
        ("5 2\nthe 1 2\n", "its vectors have 2 numbers, expected 3"),
        ("the 1 2 3\nred 1 x 3\n", "line 2: expected finite numbers after the word, got 'red 1 x 3'"),
        ("the 1 2 nan\n", "line 1: expected finite numbers"),
        ("of 1 2 3\n", "it has none of the 2 words of the vocabulary"),
        ("\x00\x01binary", "line 1: expected a word and 3 numbers"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "v.txt", text)
    with pytest.raises(ValueError, match=message) as error:
        read_word_vectors(path, ["the", "red"], 3)
    assert str(path) in str(error.value)


def test_an_encoder_starts_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "vocab.txt", "[PAD]\nred\n##s\ncircle\n")
    write(tmp_path / "vectors.txt", "".join(f"{word} {' '.join(['0.5'] * 64)}\n" for word in ("circle", "red", "of")))
    model = models.create("rnr_tiny")
    before = model.text_encoder.vectors.weight.detach().clone()
    model.load_pretrained({"image": False, "text": str(tmp_path)})
    after = model.text_encoder.vectors.weight.detach()
    assert torch.equal(after[[1, 3]], torch.full((2, 64), 0.5))
    untouched = [i for i in range(1280) if i not in (1, 3)]
    assert torch.equal(after[untouched], before[untouched])
    assert base_of(model.text_encoder, str(tmp_path)).digests == {}  # nothing of it can be had again: files hold it all


def test_refused_folders(tmp_path: Path) -> None:
    encoder = models.create("rnr_tiny", text__vocab_size=2).text_encoder
    with pytest.raises(ValueError, match="no published weights; give pretrained=.*'text': False"):
        encoder.load_pretrained(None)
    with pytest.raises(ValueError, match="has no vocab.txt; expected a folder with vocab.txt and vectors.txt"):
        encoder.load_pretrained(str(tmp_path))
    write(tmp_path / "vocab.txt", "a\nb\nc\n")
    write(tmp_path / "vectors.txt", "a 1\n")
    with pytest.raises(ValueError, match="vocab.txt has 3 tokens; this encoder embeds 2"):
        encoder.load_pretrained(str(tmp_path))
