"""Accuracy on hidden words: counted right, whatever the batches, and blind where it says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from magnet_fast.data.hidden_tokens import HiddenTokens, TokenHider
from magnet_fast.data.sample import Sample
from magnet_fast.data.tokenizers import Tokenizer
from magnet_fast.models import Text
from magnet_fast.training.terms.hidden_words import hidden_word_accuracy

from ..fakes import FakeDataset

SENTENCES = ("red circle", "the blue circle", "green star")
KINDS = {"red": "colour", "blue": "colour", "green": "colour", "circle": "shape", "star": "shape"}


class SceneDataset(FakeDataset):
    """Three sentences in turn; the first pixel tells which, and the mask is full where its shape is a circle."""

    def __init__(self, length: int, kinds: dict[str, str] | None = None) -> None:
        super().__init__(length)
        self.tokenizer = Tokenizer(max_tokens=6)
        if kinds is not None:
            self.word_kinds = kinds

    def __getitem__(self, index: int) -> Sample:
        ids, mask = self.tokenizer(SENTENCES[index % 3])
        sample = {**super().__getitem__(index), "text": Text(ids[0], mask[0])}
        sample["image"][0, 0, 0] = 1 + index % 3
        sample["mask"] = torch.full_like(sample["mask"], index % 3 != 2)
        return sample


class Reader(nn.Module):
    """In place of a grounding term. With the image it says the colour, else "blue"; with the mask "circle" where it is
    full; whatever else is hidden it takes for "star". It tells the kinds of hidden words by their places."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.hider = TokenHider(tokenizer)
        ids = tokenizer.vocabulary
        self.colours = torch.tensor([ids[word] for word in ("red", "blue", "green")])
        self.circle, self.star = ids["circle"], ids["star"]
        self.seen: list[tuple[int, ...]] = []

    def read(self, model, batch: dict, hidden: HiddenTokens, *, image: bool) -> tuple[Tensor, Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        assert len(batch["image"]) == len(batch["mask"]) == len(hidden.text.ids)
        if image:
            self.seen += hidden.text.ids.tolist()
        pixel = batch["image"][:, 0, 0, 0] - 1 if image else torch.ones(len(batch["image"]))
        return self.colours[pixel.long()], pixel

    def predict(self, model, batch: dict, hidden: HiddenTokens, features: tuple, *, mask: bool) -> Tensor:
        full = batch["mask"].bool().flatten(1).all(1) & mask
        last = hidden.positions[:, 0] == hidden.text.mask.sum(1) - 2
        of_colour = hidden.positions[:, 0] == hidden.text.mask.sum(1) - 3
        words = torch.where(of_colour, features[0], torch.where(full & last, self.circle, self.star))
        return nn.functional.one_hot(words, 1280).float()[:, None]


class Model(nn.Linear):
    """With as many vectors as the vocabulary has words."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.text_encoder = nn.Module()
        self.text_encoder.word_embedding = torch.zeros(1280, 2)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_counts(batch_size: int) -> None:
    """Nine sentences: 9 colours, 6 circles, 3 stars, and "the" three times, which is never said."""
    data = SceneDataset(9, KINDS)
    model, reader = Model(), Reader(data.tokenizer).train()
    state = torch.get_rng_state()
    found = hidden_word_accuracy(model, reader, data, batch_size)
    assert torch.equal(torch.get_rng_state(), state)  # a training run's generator is left alone
    assert reader.training
    kinds = found.pop("kinds")
    assert found == pytest.approx(
        {
            "accuracy": 100 * 18 / 21, "without_image": 100 * 12 / 21, "without_mask": 100 * 12 / 21,
            "without_image_and_mask": 100 * 6 / 21, "most_frequent": 100 * 6 / 21, "words": 21,
            "uniform": 100 / (data.tokenizer.vocab_size - len(data.tokenizer.special_ids)),
        }
    )  # fmt: skip
    third = 100 / 3
    assert list(kinds) == ["colour", "shape", "function"]
    names = ("accuracy", "without_image", "without_mask", "without_image_and_mask", "most_frequent", "words")
    for kind, values in {
        "colour": (100, third, 100, third, third, 9),
        "shape": (100, 100, third, third, 2 * third, 9),
        "function": (0, 0, 0, 0, 100, 3),
    }.items():
        assert kinds[kind] == pytest.approx(dict(zip(names, values, strict=True))), kind
    assert len(reader.seen) == 21


def test_data_that_do_not_know_their_words_have_the_total_alone() -> None:
    data = SceneDataset(6)
    found = hidden_word_accuracy(Model(), Reader(data.tokenizer), data, 4)
    assert found["words"] == 14 and found["kinds"] == {}


def test_no_generator_is_seeded_anew(monkeypatch) -> None:
    """`manual_seed` would reseed every GPU's generator, too: dropout would then repeat after each validation."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a global generator was seeded: {arguments}")

    data = SceneDataset(3)
    for place in (torch, torch.random, torch.cuda):
        monkeypatch.setattr(place, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    assert hidden_word_accuracy(Model(), Reader(data.tokenizer), data, 4)["words"] == 7


def test_every_word_is_hidden_once_and_really() -> None:
    data = SceneDataset(3)
    reader = Reader(data.tokenizer)
    hidden_word_accuracy(Model(), reader, data, 2)
    names = {index: word for word, index in data.tokenizer.vocabulary.items()}
    shown = [" ".join(names[index] for index in ids if index).split()[1:-1] for ids in reader.seen]
    assert [" ".join(words) for words in shown] == [
        "[MASK] circle", "red [MASK]",
        "[MASK] blue circle", "the [MASK] circle", "the blue [MASK]",
        "[MASK] star", "green [MASK]",
    ]  # fmt: skip


def test_a_limit() -> None:
    data = SceneDataset(10)
    found = hidden_word_accuracy(Model(), Reader(data.tokenizer), data, 4, limit=6)
    assert found["words"] == 14 and found["most_frequent"] == pytest.approx(100 * 4 / 14)
