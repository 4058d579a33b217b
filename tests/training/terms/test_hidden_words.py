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

COLOURS = ("red", "blue", "green")


class ColourDataset(FakeDataset):
    """Sentences of a word that the image's first pixel tells: index 0, 1 or 2 of the colours."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.tokenizer = Tokenizer(max_tokens=4)

    def __getitem__(self, index: int) -> Sample:
        ids, mask = self.tokenizer(COLOURS[index % 3])
        sample = {**super().__getitem__(index), "text": Text(ids[0], mask[0])}
        sample["image"][0, 0, 0] = 1 + index % 3
        return sample


class Reader(nn.Module):
    """In place of a grounding term: says the word that the first pixel tells; of a grey image it says "blue"."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.hider = TokenHider(tokenizer)
        self.ids = tokenizer(list(COLOURS)).ids[:, 1]
        self.seen: list[tuple[int, ...]] = []

    def predict(self, model, batch: dict, hidden: HiddenTokens, *, blind: bool) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        image = batch["image"]
        self.seen += zip(batch["index"].tolist(), hidden.text.ids.tolist(), strict=True)
        pixel = torch.ones(len(image)) if blind else image[:, 0, 0, 0] - 1
        words = self.ids[pixel.long()]
        return nn.functional.one_hot(words, 1280).float()[:, None].expand(-1, hidden.positions.shape[1], -1)


class Model(nn.Linear):
    """With as many vectors as the vocabulary has words."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.text_encoder = nn.Module()
        self.text_encoder.word_embedding = torch.zeros(1280, 2)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_counts(batch_size: int) -> None:
    data = ColourDataset(10)
    model, reader = Model(), Reader(data.tokenizer).train()
    state = torch.get_rng_state()
    found = hidden_word_accuracy(model, reader, data, batch_size)
    assert torch.equal(torch.get_rng_state(), state)  # a training run's generator is left alone
    assert reader.training
    assert found["words"] == 10 and found["accuracy"] == 100.0
    assert found["without_image_and_mask"] == pytest.approx(30.0)  # three of ten are blue
    assert found["most_frequent"] == pytest.approx(40.0)  # four are red
    ordinary = data.tokenizer.vocab_size - len(data.tokenizer.special_ids)
    assert found["uniform"] == pytest.approx(100 / ordinary)
    assert len(reader.seen) == 2 * 10


def test_no_generator_is_seeded_anew(monkeypatch) -> None:
    """`manual_seed` would reseed every GPU's generator, too: dropout would then repeat after each validation."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a global generator was seeded: {arguments}")

    data = ColourDataset(6)
    for place in (torch, torch.random, torch.cuda):
        monkeypatch.setattr(place, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    assert hidden_word_accuracy(Model(), Reader(data.tokenizer), data, 4)["words"] == 6


def test_what_is_hidden_depends_on_the_sentence_and_the_seed_alone() -> None:
    data = ColourDataset(24)

    def hidden(batch_size: int, seed: int) -> list:
        torch.manual_seed(batch_size)
        reader = Reader(data.tokenizer)
        hidden_word_accuracy(Model(), reader, data, batch_size, seed=seed)
        return sorted(reader.seen)

    assert hidden(3, 0) == hidden(16, 0) != hidden(3, 1)


def test_a_limit() -> None:
    data = ColourDataset(10)
    found = hidden_word_accuracy(Model(), Reader(data.tokenizer), data, 4, limit=6)
    assert found["words"] == 6 and found["most_frequent"] == pytest.approx(100 / 3)
