"""Evaluation on real scenes through the dataset: a whole model, an oracle, the control, every fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.data import ExpressionDataset, Refer, open_tokenizer
from magnet_fast.data.scenes import write_scenes
from magnet_fast.evaluation import evaluate
from magnet_fast.models.contract import InputSpec, Prediction, Text

SIZE = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 30, 5, level="hard", image_size=96))


def open_split(root: Path, **options: object) -> ExpressionDataset:
    spec = InputSpec(size=SIZE)._replace(**options)
    return ExpressionDataset(Refer(root), "val", open_tokenizer(), spec, original=True)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = models.create("magnet_tiny", text__vocab_size=1280).eval()
    network.spec = network.spec._replace(threshold=0.2)  # so that random masks pass it
    return network


class Oracle(nn.Module):
    """Answers each sentence with its mask at the images' own size, found by picture and words."""

    def __init__(self, dataset: ExpressionDataset) -> None:
        super().__init__()
        self.answers: dict[tuple, Tensor] = {}
        for index in range(len(dataset)):
            sample = dataset[index]
            self.answers[self._key(sample["image"], sample["text"].ids)] = sample["original_mask"]

    def forward(self, image: Tensor, text: Text, context: dict[str, Tensor] | None = None) -> Prediction:
        nothing = torch.zeros(96, 96)
        found = [
            self.answers.get(self._key(picture, ids), nothing) for picture, ids in zip(image, text.ids, strict=True)
        ]
        return Prediction(torch.stack(found).float() * 40 - 20)

    @staticmethod
    def _key(image: Tensor, ids: Tensor) -> tuple:
        return image.sum().item(), tuple(ids.tolist())


def numbers(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if isinstance(value, float)}


@pytest.mark.parametrize("fit", ["squash", "letterbox", "longest"])
def test_batches_equal_one_by_one(root: Path, model: nn.Module, fit: str) -> None:
    dataset = open_split(root, fit=fit)
    single, batched = (evaluate(model, dataset, size, resolution="original", fast=False) for size in (1, 7))
    assert numbers(batched) == pytest.approx(numbers(single), abs=0.02)
    assert single["oIoU"] > 0 and single["fit"] == fit and single["image_size"] == SIZE
    assert single["by_kind"].keys() == batched["by_kind"].keys()
    assert sum(entry["sentences"] for entry in single["by_kind"].values()) == single["sentences"] == len(dataset)


def test_an_oracle_scores_full_marks_and_fails_the_control(root: Path) -> None:
    dataset = open_split(root)
    oracle = Oracle(dataset)
    scores = evaluate(oracle, dataset, 5, resolution="original", fast=False)
    assert scores["oIoU"] == scores["mIoU"] == scores["P@0.9"] == 100
    dataset.shuffle_expressions(0)
    control = evaluate(oracle, dataset, 5, resolution="original", fast=False)
    assert control["mIoU"] < 50
    assert control["sentences"] == scores["sentences"]


def test_the_square_blurs_edges_alone(root: Path) -> None:
    """At the model's square the oracle's resized masks differ from the truth resized by nearest at edges alone."""
    dataset = open_split(root)
    scores = evaluate(Oracle(dataset), dataset, 5, fast=False)
    assert 70 < scores["mIoU"] < 100


def test_training_goes_on_after_an_evaluation(root: Path, model: nn.Module) -> None:
    """Nothing that evaluation leaves in the model forbids gradients."""
    dataset = open_split(root)
    evaluate(model, dataset, limit=2, fast=False)
    sample = dataset[0]
    model(sample["image"][None], Text(*(part[None] for part in sample["text"]))).mask.sum().backward()
    model.zero_grad()
