"""The protocol on real scenes: batches, resolutions, the control; with a model that reads and one that does not."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from magnet_fast import models
from magnet_fast.data import ExpressionDataset, Refer, Tokenizer
from magnet_fast.data.scenes import write_scenes
from magnet_fast.evaluation import evaluate

from ..training.fakes import FakeDataset, FakeModel

SIZE = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 30, 5, level="hard", image_size=96))


def open_split(root: Path, split: str = "val") -> ExpressionDataset:
    return ExpressionDataset(Refer(root), split, Tokenizer(), SIZE)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = models.build("magnet_tiny", text__vocab_size=1280).eval()
    with torch.no_grad():  # so that random masks pass the threshold
        network.mask_decoder.class_head.bias.copy_(torch.tensor([-9.0, 9.0]))
    return network


class Oracle(nn.Module):
    """Answers each sentence with the referent's mask, found by its words: perfect, if the words are the right ones."""

    def __init__(self, dataset: ExpressionDataset) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers: dict[tuple, torch.Tensor] = {}
        for index in range(len(dataset)):
            item = dataset[index]
            key = (item["image"].sum().item(), tuple(item["input_ids"].tolist()))
            self.answers[key] = torch.from_numpy(np.asarray(dataset.original_mask(index))).float()

    def predict(self, image, input_ids, attention_mask, size=None):
        found = []
        for picture, ids in zip(image, input_ids, strict=True):
            nothing = torch.zeros(96, 96)
            answer = self.answers.get((picture.sum().item(), tuple(ids.tolist())), nothing)
            answer = np.array(Image.fromarray(answer.numpy()).resize(size[::-1], Image.Resampling.NEAREST))
            found.append(torch.from_numpy(answer))
        return torch.stack(found)


def numbers(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def test_batches_equal_one_by_one(root, model) -> None:
    dataset = open_split(root)
    single, batched = evaluate(model, dataset, 1), evaluate(model, dataset, 7)
    assert numbers(batched) == pytest.approx(numbers(single), abs=0.02)
    assert single["oIoU"] > 0
    assert single["by_kind"].keys() == batched["by_kind"].keys()
    assert sum(entry["sentences"] for entry in single["by_kind"].values()) == single["sentences"] == len(dataset)


def test_the_sentence_level_result_by_hand(root, model) -> None:
    """One sentence: squash, predict, threshold at 0.5, nearest ground truth."""
    dataset = open_split(root)
    item = dataset[0]
    probability = model.predict(item["image"][None], item["input_ids"][None], item["attention_mask"][None])[0]
    mask = probability > 0.5
    truth = item["mask"].bool()
    expected = 100 * ((mask & truth).sum() / (mask | truth).sum()).item()
    scores = evaluate(model, dataset, limit=1)
    assert scores["sentences"] == 1
    assert scores["oIoU"] == pytest.approx(expected, abs=1e-4)
    assert scores["mIoU"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("resolution", ["input", "original"])
def test_an_oracle_scores_full_marks_and_fails_the_control(root, resolution: str) -> None:
    dataset = open_split(root)
    oracle = Oracle(dataset)
    scores = evaluate(oracle, dataset, 5, resolution)
    assert scores["resolution"] == resolution
    assert scores["oIoU"] == scores["mIoU"] == scores["P@0.9"] == 100
    dataset.shuffle_expressions(0)
    control = evaluate(oracle, dataset, 5, resolution)
    assert control["mIoU"] < 50
    assert control["sentences"] == scores["sentences"]


def test_original_resolution_of_pictures_of_different_sizes(root, model, tmp_path) -> None:
    """Grouping by size for the batches changes neither the sentences nor their scores."""

    class Mixed(ExpressionDataset):
        def record(self, index: int) -> dict:
            record = super().record(index)
            height = 96 if index % 3 else 60
            return {**record, "height": height}

        def original_mask(self, index: int) -> np.ndarray:
            return np.ascontiguousarray(super().original_mask(index)[: self.record(index)["height"]])

    dataset = Mixed(Refer(root), "val", Tokenizer(), SIZE)
    single, batched = (evaluate(model, dataset, size, "original") for size in (1, 4))
    assert single["sentences"] == batched["sentences"] == len(dataset)
    assert numbers(batched) == pytest.approx(numbers(single), abs=0.02)


def _score_as_one_of_two(rank: int, folder: Path, limit: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    scores = evaluate(FakeModel(), FakeDataset(9), 2, limit=limit)
    (folder / f"{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("limit", [9, 1])
def test_two_processes_share_the_sentences(tmp_path, limit: int) -> None:
    """An odd number, and fewer than processes: none is scored twice, both processes get the whole result, exactly."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_score_as_one_of_two, args=(r, tmp_path, limit)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    torch.manual_seed(0)
    alone = evaluate(FakeModel(), FakeDataset(9), 2, limit=limit)
    assert alone["sentences"] == limit
    assert alone["mIoU"] > 1
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


def test_progress_and_mode(root, model) -> None:
    dataset = open_split(root)
    calls: list[tuple[int, int]] = []
    model.train()
    evaluate(model, dataset, 3, limit=8, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 8), (6, 8), (8, 8)]
    assert model.training
    model.eval()


def test_training_goes_on_after_an_evaluation(root, model) -> None:
    """Nothing that evaluation leaves in the model forbids gradients."""
    dataset = open_split(root)
    evaluate(model, dataset, limit=2)
    item = dataset[0]
    output = model(item["image"][None], item["input_ids"][None], item["attention_mask"][None])
    output.mask_logits.sum().backward()
    model.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": "full"}, "resolution: expected one of input, original, got 'full'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"limit": 0}, "no sentence to evaluate"),
    ],
)
def test_bad_arguments(root, model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, open_split(root), **arguments)
