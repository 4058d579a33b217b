"""CLIP's byte pairs and transformers' tokenizers: the released ids, transformers as a judge, what is refused."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import magnet_fast.data
from magnet_fast.data.tokenizers import ClipTokenizer, PretrainedTokenizer, Tokenizer, open_tokenizer
from magnet_fast.data.tokenizers.clip import END, START

from .vocabularies import GOLDEN_CLIP, SENTENCES, save_roberta

GOLDEN = GOLDEN_CLIP.parent
SHIPPED = Path(magnet_fast.data.__file__).with_name("vocab.txt")


@pytest.mark.parametrize("max_tokens", [17, 22])
def test_clip_equals_the_released_tokenizer(max_tokens: int) -> None:
    sentences = json.loads((GOLDEN / "cris_data.json").read_text())["sentences"]
    with np.load(GOLDEN / "cris_data.npz") as arrays:
        expected = torch.from_numpy(arrays[f"tokens{max_tokens}"])
    assert sentences.pop() == ""  # an empty expression is refused here
    tokenizer = open_tokenizer("clip", GOLDEN_CLIP, max_tokens)
    ids, mask = tokenizer(sentences)
    assert torch.equal(ids, expected[:-1]) and torch.equal(mask, expected[:-1] != 0)
    assert tokenizer.vocab_size == 49408 and tokenizer.special_ids == {START: 49406, END: 49407}
    with pytest.raises(ValueError, match="expression 6 is empty"):
        tokenizer([*sentences, ""])


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merges of our own, learnt from a few sentences, in the form of OpenAI's file."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([*SENTENCES, "the reddest stars of the tallest boxes"] * 3, trainer)
    pairs = json.loads(trained.to_str())["model"]["merges"]
    assert len(pairs) > 50
    path = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt"
    path.write_text("a title\n" + "".join(f"{' '.join(pair)}\n" for pair in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def judge(merges: Path) -> transformers.CLIPTokenizer:
    ours = ClipTokenizer(merges)
    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").split("\n")[1:-1]]
    return transformers.CLIPTokenizer(vocab=ours.vocabulary, merges=pairs)


def test_ids_of_a_file_of_merges(merges: Path) -> None:
    """Bytes in CLIP's order, bytes at the end of a word, merges, start and end."""
    vocabulary = ClipTokenizer(merges).vocabulary
    golden = json.loads((GOLDEN_CLIP / "vocab.json").read_text(encoding="utf-8"))
    assert {token: index for token, index in golden.items() if index < 512}.items() <= vocabulary.items()
    first = "".join(merges.read_text(encoding="utf-8").split("\n")[1].split())
    assert vocabulary[first] == 512
    assert (vocabulary[START], vocabulary[END]) == (len(vocabulary) - 2, len(vocabulary) - 1)


@pytest.mark.parametrize(
    "text", [*SENTENCES, "  Reddest\tSTARS\n of 2 boxes!?", "it's the man's, they'll", "東京 ☃ ñandú", "a\u00a0b"]
)
def test_clip_agrees_with_transformers(merges, judge, text: str) -> None:
    ids, _ = ClipTokenizer(merges, 77)(text)
    expected = judge(text)["input_ids"]
    assert ids[0, : len(expected)].tolist() == expected and not ids[0, len(expected) :].any()


@given(
    text=st.text(
        # Entities are undone here only; Python and the tokenizers library differ in which controls are white space.
        alphabet=st.characters(codec="utf-8", exclude_characters="&<|>'", exclude_categories=("Cc",)),
        min_size=1,
        max_size=20,
    )
)
def test_clip_agrees_with_transformers_on_any_text(merges, judge, text: str) -> None:
    if text.strip():
        expected = judge(text)["input_ids"]
        assert ClipTokenizer(merges, 200)(text).ids[0, : len(expected)].tolist() == expected


def test_clip_undoes_entities_twice_and_cuts_before_the_end(merges) -> None:
    tokenizer = ClipTokenizer(merges, 6)
    assert torch.equal(tokenizer("a &amp;amp; b").ids, tokenizer("a & b").ids)
    ids, mask = tokenizer("the small red star above the blue box")
    assert ids.shape == (1, 6) and mask.all() and ids[0, -1] == tokenizer.special_ids[END]
    whole = ClipTokenizer(merges, 60)("the small red star above the blue box").ids
    assert torch.equal(ids[0, :5], whole[0, :5])


@pytest.mark.parametrize("name", ["wordpiece", "clip"])
def test_what_to_json_gives_is_read_again(merges, tmp_path, name: str) -> None:
    tokenizer = open_tokenizer(name, {"wordpiece": SHIPPED, "clip": merges}[name])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = open_tokenizer(name, tmp_path)
    assert again.vocabulary == tokenizer.vocabulary and again.digest() == tokenizer.digest()
    for text in [*SENTENCES, "  Reddest\tSTARS\n of 2 boxes!?", "it's the man's, they'll", "東京 ☃ ñandú &amp; é"]:
        assert again.readings([text]) == tokenizer.readings([text])


def test_id_0_inside_a_token_counts_as_padding(merges) -> None:
    """As released: the decoder takes id != 0 as a word, and "!" has id 0 where a word goes on after it."""
    ids, mask = ClipTokenizer(merges, 8)("!?")
    assert ids[0, :4].tolist()[1] == 0 and mask[0, :4].tolist() == [True, False, True, True]


def test_clip_from_every_file(merges: Path, judge, tmp_path: Path) -> None:
    expected = ClipTokenizer(merges, 40)
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress(merges.read_bytes()))
    judge.save_pretrained(tmp_path / "json")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(expected.vocabulary))
    (tmp_path / "two" / "merges.txt").write_bytes(merges.read_bytes())
    assert (tmp_path / "json" / "tokenizer.json").is_file()
    for vocabulary in (merges, merges.parent, packed, str(tmp_path / "json"), tmp_path / "two"):
        other = open_tokenizer("clip", vocabulary, 40)
        assert all(torch.equal(other(text).ids, expected(text).ids) for text in SENTENCES)
        assert other.digest() == expected.digest() and other.matches(expected.digest())
    copy = pickle.loads(pickle.dumps(expected))
    assert torch.equal(copy(SENTENCES).ids, expected(SENTENCES).ids)


def test_openais_file_is_read_as_far_as_clip_reads_it(tmp_path: Path) -> None:
    """It holds 262,144 merges, of which CLIP has 48,894; what follows must not move the start and end tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + d for a in letters for b in letters for c in letters for d in letters][:60_000]
    path = tmp_path / "bpe_simple_vocab_16e6.txt"
    path.write_text("title\n" + "".join(f"{word[:2]} {word[2:]}\n" for word in words))
    with pytest.raises(ValueError, match="merges do not fit"):  # pairs of pairs that nothing makes
        ClipTokenizer(path)
    path.write_text("title\n" + "".join(f"{chr(97 + k % 26)} {chr(97 + k // 26 % 26)}\n" for k in range(60_000)))
    assert ClipTokenizer(path).special_ids == {START: 49406, END: 49407}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bpe_simple_vocab_16e6.txt", b"title\na b\nc d e\n", r"a line of merges is 'c d e'"),
        ("bpe_simple_vocab_16e6.txt.gz", b"no gzip", "is not CLIP's vocabulary"),
        ("bpe_simple_vocab_16e6.txt", b"title\n\xff\xfe\n", "is not CLIP's vocabulary"),
        ("vocab.json", b"[1, 2]", "holds no dict of tokens and ids"),
        ("vocab.json", b'{"a": 0}', r"lacks 513 tokens, '!' among them"),
        ("tokenizer.json", b'{"model": 3}', "is not CLIP's vocabulary"),
    ],
)
def test_unusable_files_of_clip(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "merges.txt").write_text("title\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        ClipTokenizer(tmp_path)


def test_absent_files_of_clip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary: CLIP's does not ship"):
        open_tokenizer("clip")
    with pytest.raises(FileNotFoundError, match="nothing.txt does not exist"):
        open_tokenizer("clip", tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="holds nothing of CLIP's"):
        open_tokenizer("clip", tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        open_tokenizer("clip", tmp_path)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_roberta(tmp_path_factory.mktemp("tokenizers") / "roberta")


def test_a_transformers_tokenizer_with_its_own_padding_and_special_tokens(roberta: str) -> None:
    tokenizer = open_tokenizer(roberta, max_tokens=40)
    judge = transformers.AutoTokenizer.from_pretrained(roberta)
    expected = judge(SENTENCES, padding="max_length", max_length=40, return_tensors="pt")
    ids, mask = tokenizer(SENTENCES)
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"].bool())
    assert tokenizer.padding_id == 1 and (ids[~mask] == 1).all()
    assert tokenizer.special_ids["<mask>"] == tokenizer.mask_id == judge.mask_token_id
    assert tokenizer.vocab_size == len(judge)
    short = open_tokenizer("any name", roberta, max_tokens=5)(SENTENCES)
    expected = judge(SENTENCES, truncation=True, max_length=5, return_tensors="pt")["input_ids"]
    assert torch.equal(short.ids, expected) and short.mask.all()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy(SENTENCES).ids, ids) and copy.digest() == tokenizer.digest()


def test_bert_by_transformers_is_our_wordpiece(tmp_path: Path) -> None:
    tokens = SHIPPED.read_text().split()
    saved = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)
    saved.save_pretrained(tmp_path)
    theirs, ours = open_tokenizer(str(tmp_path), max_tokens=30), Tokenizer(max_tokens=30)
    for found, expected in zip(theirs(SENTENCES), ours(SENTENCES), strict=True):
        assert torch.equal(found, expected)
    assert theirs.mask_id == ours.mask_id and theirs.special_ids == ours.special_ids


def test_a_python_tokenizer(tmp_path: Path) -> None:
    """Not every transformers tokenizer runs on the tokenizers library; such a one is called as it is."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "star"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic", "do_lower_case": True})
    )
    tokenizer = PretrainedTokenizer(tmp_path, 6)
    ids, mask = tokenizer(["the red star", "the red red red red red star"])
    assert ids.tolist() == [[2, 5, 6, 7, 3, 0], [2, 5, 6, 6, 6, 3]] and mask.sum(1).tolist() == [5, 6]


def test_no_tokenizer_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="transformers finds no tokenizer"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(TypeError, match="max_tokens"):
        open_tokenizer(str(tmp_path), max_tokens="20")


def test_no_padding_token(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no padding token"):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "recursion"),
        (
            b'{"model": {"merges": [], "vocab": {"a": 4294967296}}}',
            "expected ids of tokens that are whole",
        ),
        (b'{"model": {"merges": [], "vocab": {}}, "added_tokens": [{"content": "a", "id": "x"}]}', "got 'x'"),
    ],
)
def test_hostile_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json is not CLIP's vocabulary .*{message}"):
        ClipTokenizer(tmp_path)


def test_a_packed_file_of_merges_is_unpacked_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magnet_fast.data.tokenizers.clip._LARGEST", 1000)
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    for content, message in (
        (gzip.compress(bytes(5000)), "expected at most 1000 bytes"),
        (b"\x1f\x8b\x08\x00junk", ""),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"is not CLIP's vocabulary .*{message}"):
            ClipTokenizer(path)
