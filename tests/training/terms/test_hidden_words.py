"""Accuracy on hidden words: counted right, whatever the batches, and blind where it says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from magnet_fast.data import Tokenizer
from magnet_fast.data.masking import TokenMasker
from magnet_fast.training.hidden_words import hidden_word_accuracy

from .fakes import FakeDataset

COLOURS = ("red", "blue", "green")


class ColourDataset(FakeDataset):
    """Sentences of a word that the image's first pixel tells: index 0, 1 or 2 of the colours."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.tokenizer = Tokenizer(max_words=4)

    def __getitem__(self, index: int) -> dict:
        ids, mask = self.tokenizer(self.record(index)["expression"])
        item = {**super().__getitem__(index), "input_ids": ids[0], "attention_mask": mask[0]}
        item["image"][0, 0, 0] = 1 + index % 3
        return item

    def record(self, index: int) -> dict:
        return {"expression": COLOURS[index % 3], "kind": None}


class Reader(nn.Module):
    """In place of a grounding: says the word that the first pixel tells; of a grey image it says "blue"."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.masker = TokenMasker(tokenizer)
        self.ids = tokenizer(list(COLOURS))[0][:, 1]
        self.seen: list[int] = []

    def predict(
        self, model, image: Tensor, attention_mask, mask, input_ids, positions: Tensor, *, blind: bool
    ) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(len(image))
        pixel = torch.ones(len(image)) if blind else image[:, 0, 0, 0] - 1
        words = self.ids[pixel.long()]
        return nn.functional.one_hot(words, 1280).float()[:, None].expand(-1, positions.shape[1], -1)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_counts(batch_size: int) -> None:
    data = ColourDataset(10)
    model, reader = nn.Linear(1, 1), Reader(data.tokenizer).train()
    state = torch.get_rng_state()
    found = hidden_word_accuracy(model, reader, data, batch_size)
    assert torch.equal(torch.get_rng_state(), state)  # a training run's generator is left alone
    assert reader.training
    assert found["words"] == 10 and found["accuracy"] == 100.0
    assert found["without_image_and_mask"] == pytest.approx(30.0)  # three of ten are blue
    assert found["most_frequent"] == pytest.approx(40.0)  # four are red
    ordinary = data.tokenizer.vocab_size - len(data.tokenizer.special_ids)
    assert found["uniform"] == pytest.approx(100 / ordinary)
    assert sum(reader.seen) == 2 * 10


def test_a_limit() -> None:
    data = ColourDataset(10)
    found = hidden_word_accuracy(nn.Linear(1, 1), Reader(data.tokenizer), data, 4, limit=6)
    assert found["words"] == 6 and found["most_frequent"] == pytest.approx(100 / 3)
