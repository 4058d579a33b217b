"""Which tokens are hidden, how many, and by what."""

from __future__ import annotations

import pytest
import torch

from magnet_fast.data import Tokenizer
from magnet_fast.data.hidden_tokens import HiddenTokens, TokenHider
from magnet_fast.data.tokenizers import ClipTokenizer, open_tokenizer
from magnet_fast.models.contract import Text

from .vocabularies import GOLDEN_CLIP, save_roberta

SENTENCES = ["the red circle left of the large blue square", "circle", "second green star from the left", "the"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(max_tokens=20)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same(first: HiddenTokens, second: HiddenTokens) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*first.text, *first[1:]), (*second.text, *second[1:]), strict=True))


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5, 1.0])
def test_number_and_place_of_the_chosen(tokenizer: Tokenizer, share: float) -> None:
    text = tokenizer(SENTENCES)
    special = set(tokenizer.special_ids.values())
    hider = TokenHider(tokenizer, share)
    for _ in range(20):
        found = hider(text)
        for row, ids in enumerate(text.ids):
            ordinary = [place for place, index in enumerate(ids.tolist()) if index not in special]
            chosen = found.positions[row][found.valid[row]].tolist()
            assert len(chosen) == max(1, int(share * len(ordinary) + 0.5))
            assert len(set(chosen)) == len(chosen) and set(chosen) <= set(ordinary)
            assert found.targets[row][found.valid[row]].tolist() == ids[chosen].tolist()
            others = [place for place in range(len(ids)) if place not in chosen]
            assert torch.equal(found.text.ids[row, others], ids[others])
            assert torch.equal(found.text.mask, text.mask)


@pytest.mark.parametrize(("scheme", "masked", "kept"), [("90/10", 0.9, 0.1), ("80/10/10", 0.8, 0.1)])
def test_what_stands_there_instead(tokenizer: Tokenizer, scheme: str, masked: float, kept: float) -> None:
    text = Text(*(row.repeat(4000, 1) for row in tokenizer(SENTENCES[:1])))
    found = TokenHider(tokenizer, 0.5, scheme)(text)
    new = found.text.ids.gather(1, found.positions)[found.valid]
    old = found.targets[found.valid]
    special = tokenizer.special_ids
    # Sixteen thousand draws: 0.02 is more than seven standard deviations.
    assert (new == special["[MASK]"]).float().mean().item() == pytest.approx(masked, abs=0.02)
    assert (new == old).float().mean().item() == pytest.approx(kept, abs=0.02)
    random = new[(new != old) & (new != special["[MASK]"])]
    assert len(random) == 0 if scheme == "90/10" else len(random.unique()) > 300
    assert not set(random.tolist()) & set(special.values())


def test_every_ordinary_token_can_be_chosen(tokenizer: Tokenizer) -> None:
    text = Text(*(row.repeat(2000, 1) for row in tokenizer(SENTENCES[:1])))
    found = TokenHider(tokenizer)(text)
    words = int(text.mask[0].sum()) - 2
    counts = torch.bincount(found.positions[found.valid], minlength=words + 1)[1 : words + 1]
    expected = found.valid.sum() / words
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


def test_preferred_tokens_are_drawn_by_their_weight(tokenizer: Tokenizer) -> None:
    """Of six words two weigh five: each next one by the weights of those left."""
    text = Text(*(row.repeat(6000, 1) for row in tokenizer(["the red circle on the left"])))
    preferred = [tokenizer.vocabulary[word] for word in ("red", "circle")]
    found = TokenHider(tokenizer, 2 / 6, preferred=preferred)(text)
    among = torch.isin(found.targets, torch.tensor(preferred)) & found.valid
    both, first = 10 / 14 * 5 / 9, 10 / 14
    one = first * 4 / 9 + 4 / 14 * 10 / 13
    shares = [(among.sum(1) == number).float().mean().item() for number in (2, 1)]
    assert shares == pytest.approx([both, one], abs=0.04)  # six thousand draws: over six standard deviations
    assert (found.valid.sum(1) == 2).all()
    every = TokenHider(tokenizer, 1.0, preferred=preferred)(text)
    assert (every.valid.sum(1) == 6).all()


def test_one_by_one(tokenizer: Tokenizer) -> None:
    text = tokenizer(["the red circle", "a zyzzyva"])  # the last is unknown, if not in pieces
    text.ids[1, 2:] = torch.where(text.mask[1, 2:], tokenizer.unknown_id, text.ids[1, 2:])
    rows, found = TokenHider(tokenizer, 0.5).one_by_one(text)
    assert rows.tolist() == [0, 0, 0, 1] and found.positions[:, 0].tolist() == [1, 2, 3, 1]
    assert found.valid.all() and found.valid.shape == (4, 1)
    for row, (own, place) in enumerate(zip(rows, found.positions[:, 0], strict=True)):
        expected = text.ids[own].clone()
        assert found.targets[row, 0] == expected[place]
        expected[place] = tokenizer.mask_id
        assert torch.equal(found.text.ids[row], expected) and torch.equal(found.text.mask[row], text.mask[own])
        assert found.covered[row].nonzero()[:, 0].tolist() == [place.item()]
    clip = ClipTokenizer(GOLDEN_CLIP, max_tokens=12)
    text = clip(["the man in red"])
    rows, found = TokenHider(clip).one_by_one(text)
    assert len(rows) == int(text.mask.sum()) - 2 and torch.equal(found.text.ids, text.ids[rows])
    assert (found.covered.sum(1) == 1).all()


def test_nothing_to_choose(tokenizer: Tokenizer) -> None:
    text = tokenizer(["a word"])
    text.ids[0, 1:-1] = tokenizer.special_ids["[UNK]"]
    found = TokenHider(tokenizer)(text)
    assert not found.valid.any() and torch.equal(found.text.ids, text.ids)


def test_repeats_with_the_generator(tokenizer: Tokenizer) -> None:
    hider, sentences = TokenHider(tokenizer, 0.5), tokenizer(SENTENCES)
    torch.manual_seed(3)
    first = hider(sentences)
    torch.manual_seed(3)
    second = hider(sentences)
    other = hider(sentences)
    assert same(first, second)
    assert not torch.equal(first.positions, other.positions)


def test_a_generator_of_its_own_leaves_torchs_alone(tokenizer: Tokenizer) -> None:
    hider, sentences = TokenHider(tokenizer, 0.5, "80/10/10"), tokenizer(SENTENCES)
    state = torch.random.get_rng_state()
    first = hider(sentences, torch.Generator().manual_seed(4))
    torch.manual_seed(9)
    second = hider(sentences, torch.Generator().manual_seed(4))
    assert same(first, second) and not same(first, hider(sentences, torch.Generator().manual_seed(5)))
    torch.random.set_rng_state(state)
    hider(sentences, torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_mask_token_of_another_name(tmp_path) -> None:
    tokenizer = open_tokenizer(save_roberta(tmp_path / "roberta"), max_tokens=12)
    text = tokenizer(["the red circle", "the blue"])
    hider = TokenHider(tokenizer, 1.0)
    found = hider(text, torch.Generator().manual_seed(0))
    assert hider.mask_id == tokenizer.special_ids["<mask>"]
    assert found.valid.sum(1).tolist() == [int(row.sum()) - 2 for row in text.mask]
    assert (found.text.ids == hider.mask_id).any() and not (found.text.ids == hider.mask_id)[~text.mask].any()
    assert (found.text.ids[:, 0] == tokenizer.special_ids["<s>"]).all()


def test_only_ids_of_the_vocabulary_stand_in_for_others() -> None:
    """CLIP's golden vocabulary has 619 of 49408 ids; the rest is nobody's word."""
    tokenizer = ClipTokenizer(GOLDEN_CLIP)
    tokenizer.mask_id = tokenizer.vocabulary["*"]
    assert TokenHider(tokenizer).ordinary_words == len(tokenizer.vocabulary) - 2


def test_refusals(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="scheme: expected one of 90/10, 80/10/10, got '70/30'"):
        TokenHider(tokenizer, scheme="70/30")
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share: expected"):
            TokenHider(tokenizer, share)
    for wrong in (tokenizer.unknown_id, 10**6, -1):
        with pytest.raises(ValueError, match=f"preferred: expected ids of ordinary tokens of .*, got {wrong}"):
            TokenHider(tokenizer, preferred=[wrong])


def test_without_a_mask_token_places_are_told() -> None:
    """CLIP has no [MASK]: ids stay, and who encodes them covers the places; start and end are never among them."""
    tokenizer = ClipTokenizer(GOLDEN_CLIP, max_tokens=12)
    text = tokenizer(["the man in red", "left"])
    found = TokenHider(tokenizer, 1.0)(text, torch.Generator().manual_seed(0))
    assert torch.equal(found.text.ids, text.ids)
    special = torch.tensor(list(tokenizer.special_ids.values()))
    assert found.covered.any() and not found.covered[torch.isin(text.ids, special) | ~text.mask].any()
    assert (found.covered.sum(1) <= found.valid.sum(1)).all()


def test_covered_are_the_mask_tokens(tokenizer: Tokenizer) -> None:
    found = TokenHider(tokenizer, 0.5)(tokenizer(SENTENCES), torch.Generator().manual_seed(0))
    assert torch.equal(found.covered, found.text.ids == tokenizer.mask_id) and found.covered.any()
