"""Which tokens are hidden, how many, and by what."""

from __future__ import annotations

import pytest
import torch

from magnet_fast.data import Tokenizer
from magnet_fast.data.masking import TokenMasker

SENTENCES = ["the red circle left of the large blue square", "circle", "second green star from the left", "the"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(max_words=20)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5, 1.0])
def test_number_and_place_of_the_chosen(tokenizer: Tokenizer, share: float) -> None:
    input_ids, attention_mask = tokenizer(SENTENCES)
    special = set(tokenizer.special_ids.values())
    masker = TokenMasker(tokenizer, share)
    for _ in range(20):
        found = masker(input_ids, attention_mask)
        for row, ids in enumerate(input_ids):
            ordinary = [place for place, index in enumerate(ids.tolist()) if index not in special]
            chosen = found.positions[row][found.valid[row]].tolist()
            assert len(chosen) == max(1, int(share * len(ordinary) + 0.5))
            assert len(set(chosen)) == len(chosen) and set(chosen) <= set(ordinary)
            assert found.targets[row][found.valid[row]].tolist() == ids[chosen].tolist()
            others = [place for place in range(len(ids)) if place not in chosen]
            assert torch.equal(found.input_ids[row, others], ids[others])


@pytest.mark.parametrize(("scheme", "masked", "kept"), [("90/10", 0.9, 0.1), ("80/10/10", 0.8, 0.1)])
def test_what_stands_there_instead(tokenizer: Tokenizer, scheme: str, masked: float, kept: float) -> None:
    input_ids, attention_mask = (row.repeat(4000, 1) for row in tokenizer(SENTENCES[:1]))
    found = TokenMasker(tokenizer, 0.5, scheme)(input_ids, attention_mask)
    new = found.input_ids.gather(1, found.positions)[found.valid]
    old = found.targets[found.valid]
    special = tokenizer.special_ids
    # Sixteen thousand draws: 0.02 is more than seven standard deviations.
    assert (new == special["[MASK]"]).float().mean().item() == pytest.approx(masked, abs=0.02)
    assert (new == old).float().mean().item() == pytest.approx(kept, abs=0.02)
    random = new[(new != old) & (new != special["[MASK]"])]
    assert len(random) == 0 if scheme == "90/10" else len(random.unique()) > 300
    assert not set(random.tolist()) & set(special.values())


def test_every_ordinary_token_can_be_chosen(tokenizer: Tokenizer) -> None:
    input_ids, attention_mask = (row.repeat(2000, 1) for row in tokenizer(SENTENCES[:1]))
    found = TokenMasker(tokenizer)(input_ids, attention_mask)
    words = int(attention_mask[0].sum()) - 2
    counts = torch.bincount(found.positions[found.valid], minlength=words + 1)[1 : words + 1]
    expected = found.valid.sum() / words
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


def test_nothing_to_choose(tokenizer: Tokenizer) -> None:
    input_ids, attention_mask = tokenizer(["a word"])
    input_ids[0, 1:-1] = tokenizer.special_ids["[UNK]"]
    found = TokenMasker(tokenizer)(input_ids, attention_mask)
    assert not found.valid.any() and torch.equal(found.input_ids, input_ids)


def test_repeats_with_the_generator(tokenizer: Tokenizer) -> None:
    masker, sentences = TokenMasker(tokenizer, 0.5), tokenizer(SENTENCES)
    torch.manual_seed(3)
    first = masker(*sentences)
    torch.manual_seed(3)
    second = masker(*sentences)
    other = masker(*sentences)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.positions, other.positions)


def test_refusals(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="scheme: expected one of 90/10, 80/10/10, got '70/30'"):
        TokenMasker(tokenizer, scheme="70/30")
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share: expected"):
            TokenMasker(tokenizer, share)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n")
    with pytest.raises(ValueError, match=r"lacks \[MASK\]"):
        TokenMasker(Tokenizer(vocabulary))
