"""WordPiece against transformers' BertTokenizer, its limits, and what the digest of a vocabulary says."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import magnet_fast.data
from magnet_fast.data import Refer
from magnet_fast.data.tokenizers import Tokenizer, open_tokenizer

VOCABULARY = Path(magnet_fast.data.__file__).with_name("vocab.txt")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> transformers.PreTrainedTokenizerBase:
    tokens = VOCABULARY.read_text().split()
    return transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)


def both(tokenizer, bert, text):
    ours, mask = tokenizer(text)
    theirs = bert(text)["input_ids"][: tokenizer.max_tokens]
    return ours[0][: int(mask.sum())].tolist(), theirs


@pytest.mark.parametrize(
    "text",
    [
        "the small red star above the blue box",
        "Second CIRCLE from the left!",
        "café: the über-waiter's 2nd plate (left)",
        "zyzzyva 東京 left\tof\nthe\u00a0man",
        "word " * 40,
    ],
)
def test_agrees_with_bert(tokenizer, bert, text):
    ours, theirs = both(tokenizer, bert, text)
    assert ours == theirs


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="[]"), min_size=1, max_size=30))
def test_agrees_with_bert_on_any_text(tokenizer, bert, text):
    if len(bert(text)["input_ids"]) > 2:
        ours, theirs = both(tokenizer, bert, text)
        assert ours == theirs
    else:  # nothing between [CLS] and [SEP]
        with pytest.raises(ValueError, match="expression 0 (is empty|leaves no word to read)"):
            tokenizer(text)


def test_shapes_padding_and_mask(tokenizer):
    ids, mask = tokenizer(["red star", "the third circle from the left"])
    assert ids.shape == mask.shape == (2, 20)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [4, 8]
    assert ids[~mask].eq(0).all() and ids[mask].ne(0).all()
    tokens = VOCABULARY.read_text().splitlines()
    assert [tokens[i] for i in ids[0][:4]] == ["[CLS]", "red", "star", "[SEP]"]
    single, _ = tokenizer("red star")
    assert torch.equal(single[0], ids[0])


def test_sentence_of_200_words_is_cut(tokenizer):
    ids, mask = tokenizer(" ".join(["left"] * 200))
    tokens = VOCABULARY.read_text().splitlines()
    assert ids.shape == (1, 20) and mask.all()
    assert [tokens[i] for i in ids[0]] == ["[CLS]"] + ["left"] * 19
    assert Tokenizer(max_tokens=7)(" ".join(["left"] * 200))[0].shape == (1, 7)


@pytest.mark.parametrize("text", ["", "   ", "\t\n"])
def test_empty_expression_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="expression 1 is empty"):
        tokenizer(["red star", text])


def test_non_text_is_refused(tokenizer):
    with pytest.raises(TypeError, match="expression 0 is a int"):
        tokenizer([3])


def test_vocabulary_spells_every_word_and_holds_the_scenes_words(tokenizer):
    tokens = VOCABULARY.read_text().splitlines()
    assert len(set(tokens)) == len(tokens) == tokenizer.vocab_size
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"circle", "star", "red", "cyan", "second", "leftmost", "checkered"} <= set(tokens)
    ids, _ = tokenizer("xylophone qwertz 4711")
    assert tokens.index("[UNK]") not in ids


def test_words_read_letter_by_letter_are_told_of_once(tokenizer):
    text = "the Parking meter, my answer: squares, zebra's 12 XYLO and a xylo"
    (reading,) = Tokenizer(max_tokens=60).readings([text])
    # "me ##ter" and "square ##s" have parts that mean something; numbers and letters are spelled so by everybody.
    assert reading.spelled == ("Parking", "answer", "XYLO", "xylo")
    assert reading.complete and not reading.unknown
    told = "read letter by letter, known only to a model trained with such words: 'Parking', 'answer', 'XYLO', 'xylo'"
    assert reading.notes == {"spelled": told}
    short = Tokenizer(max_tokens=6)
    with pytest.warns(UserWarning, match=rf"expression 'the .*: {told[:60]}.* 'parking'; it is cut after 6 tokens"):
        short(["the parking quagga"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short(["quagga"])
        Tokenizer()(["the square below the little cyan thing", "an elephant's trunk, 2nd from left"])


def test_a_large_vocabulary_may_have_words_in_parts(tmp_path, tokenizer):
    path = tmp_path / "vocab.txt"
    words = [f"word{number}" for number in range(4000)]
    path.write_text("\n".join([*sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.__getitem__), *words]))
    (reading,) = Tokenizer(path).readings(["parking"])
    assert len(reading.ids) > 3 and reading.notes == {}


def test_no_word_of_the_drawn_scenes_is_read_letter_by_letter(easy_root):
    reader = Refer(easy_root)
    texts = {sentence.raw for split in reader.splits for ref in reader.refs(split) for sentence in ref.sentences}
    assert len(texts) > 50
    assert not any(reading.spelled for reading in Tokenizer(max_tokens=60).readings(sorted(texts)))


def test_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy("the red star")[0], tokenizer("the red star")[0])


def test_vocabulary_from_file_folder_and_json(tmp_path, tokenizer, bert):
    (tmp_path / "vocab.txt").write_bytes(VOCABULARY.read_bytes().replace(b"\n", b"\r\n"))
    folder = tmp_path / "saved"
    bert.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    text = "the small red star"
    for vocab in (VOCABULARY, str(VOCABULARY), tmp_path, folder, folder / "tokenizer.json"):
        other = Tokenizer(vocab)
        assert other.vocab_size == tokenizer.vocab_size
        assert torch.equal(other(text)[0], tokenizer(text)[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[CLS]\n[SEP]\nred\n", r"lacks \[UNK\]"),
        (b"[PAD]\n[UNK]\n[SEP]\nred\n", r"lacks \[CLS\]"),
        (b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n", r"\[PAD\] id 1; expected 0"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\nred\n", "'red' twice"),
        (b"[PAD]\n\xff\xfe\n", "not a vocabulary in UTF-8"),
    ],
)
def test_unusable_vocabulary(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"vocab\.txt.*{message}"):
        Tokenizer(tmp_path)


def test_absent_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt does not exist"):
        Tokenizer(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match=r"neither vocab\.txt nor tokenizer\.json"):
        Tokenizer(tmp_path)


def test_broken_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer(tmp_path)


def test_digest_of_the_shipped_vocabulary():
    """Checkpoints of before keep it; `sha256sum` of the file without its last line end gives it, too."""
    expected = "aabf31214339a6c46063084186942342aa18ab353a8f7ba92660cdeba99fa231"
    assert Tokenizer().digest() == expected == hashlib.sha256(VOCABULARY.read_bytes().rstrip(b"\n")).hexdigest()


def test_digest_is_one_in_every_file_format(tmp_path, tokenizer, bert):
    bert.save_pretrained(tmp_path / "saved")
    (tmp_path / "vocab.txt").write_bytes(VOCABULARY.read_bytes().replace(b"\n", b"\r\n"))
    for vocabulary in (tmp_path / "saved", tmp_path / "vocab.txt"):
        assert Tokenizer(vocabulary).digest() == tokenizer.digest()
    assert open_tokenizer(str(tmp_path / "saved")).digest() == tokenizer.digest()


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "a\u2029b", "\u001c"])
def test_digest_tells_tokens_apart_that_hold_line_ends_of_unicode(tmp_path, odd):
    """`splitlines` takes them for line ends: two vocabularies that differ there had one digest."""
    start = "[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n"
    (tmp_path / "one.txt").write_text(start + f"x{odd}y\n", newline="")
    (tmp_path / "other.txt").write_text(start + "x\ny\n", newline="")
    one, other = Tokenizer(tmp_path / "one.txt"), Tokenizer(tmp_path / "other.txt")
    assert one.vocab_size == 6 and one.vocabulary[f"x{odd}y"] == 5
    assert one.digest() != other.digest()
    assert one.matches(one.digest()) and not one.matches(Tokenizer().digest())


def test_checkpoints_of_before_still_know_their_vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n\u00a0\nx\u2028y\nred\n", newline="")
    lines = [token.strip() for token in path.read_text(encoding="utf-8").splitlines()]  # as it was computed
    before = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    tokenizer = Tokenizer(path)
    assert tokenizer.digest() != before and tokenizer.matches(before)


@pytest.mark.parametrize(("max_tokens", "error"), [(2, ValueError), ("20", TypeError), (True, TypeError)])
def test_max_tokens_is_checked(max_tokens, error):
    with pytest.raises(error, match="max_tokens"):
        Tokenizer(max_tokens=max_tokens)


@pytest.mark.parametrize("index", [1 << 31, 10**30, -1, 1.5, None, True])
def test_ids_that_tables_would_be_made_for_are_bounded(tmp_path, index):
    tree = json.loads(Tokenizer().to_json())
    path = tmp_path / "tokenizer.json"
    for change in ("vocab", "added_tokens"):
        changed = json.loads(json.dumps(tree))
        if change == "vocab":
            changed["model"]["vocab"]["zebra"] = index
        else:
            changed["added_tokens"] = [{"id": index, "content": "zebra"}]
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"tokenizer\.json: expected ids of tokens that are whole numbers below"):
            Tokenizer(path)


def test_what_the_library_raises_while_it_encodes_names_the_file(tmp_path):
    tree = json.loads(Tokenizer().to_json())
    tree["model"]["unk_token"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"tokenizer\.json: encoding: WordPiece error: Missing"):
        Tokenizer(tmp_path)("日本")


def test_nested_json_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer(tmp_path)
