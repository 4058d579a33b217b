"""A model scored on samples: batches, resolutions, processes, what is refused; oracles, and models that answer NaN."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from magnet_fast.evaluation import TASKS, evaluate
from magnet_fast.models.contract import InputSpec, Prediction, probability

from .fakes import SIZE, FakeDataset, FakeModel, Middle, Oracle, Says

MIXED = ((16, 16), (9, 21), (16, 16), (30, 12))


def seeded(presence: bool = False) -> FakeModel:
    torch.manual_seed(1)
    return FakeModel(presence)


def numbers(found: dict) -> dict:
    return {name: value for name, value in found.items() if isinstance(value, float)}


@pytest.mark.parametrize("task", ["single", "generalized", "robust", "region"])
@pytest.mark.parametrize("resolution", ["input", "original"])
def test_batches_equal_one_by_one(task: str, resolution: str) -> None:
    """Pictures of several sizes in a batch, sentences without target, kinds: nothing depends on the batch."""
    dataset = FakeDataset(negatives=True, sizes=MIXED, original=True)
    options = {"task": task, "resolution": resolution, "fast": False}
    single, batched = (evaluate(seeded(True), dataset, size, **options) for size in (1, 7))
    assert numbers(batched) == pytest.approx(numbers(single), nan_ok=True, abs=0.02)
    assert single["sentences"] == len(dataset)
    assert numbers(batched["by_kind"]["even"]) == pytest.approx(
        numbers(single["by_kind"]["even"]), nan_ok=True, abs=0.02
    )
    assert single["by_kind"]["even"]["sentences"] == 12
    assert any(value > 0 for name, value in numbers(single).items() if name in TASKS[task].scores)


@pytest.mark.parametrize("resolution", ["input", "original"])
def test_the_sentence_level_result_by_hand(resolution: str) -> None:
    """Predict, exceed the model's threshold, compare with the truth at that size."""
    dataset, model = FakeDataset(sizes=((9, 21),), original=True), seeded()
    sample = dataset[0]
    truth = sample["mask" if resolution == "input" else "original_mask"].bool()
    with torch.no_grad():
        prediction = model(sample["image"][None], type(sample["text"])(*(part[None] for part in sample["text"])))
    mask = probability(prediction, truth.shape)[0] > 0.4
    expected = 100 * ((mask & truth).sum() / (mask | truth).sum()).item()
    found = evaluate(model, dataset, limit=1, resolution=resolution, fast=False)
    assert found["sentences"] == 1 and 0 < expected < 100
    assert found["oIoU"] == pytest.approx(expected, abs=1e-4)
    assert found["mIoU"] == pytest.approx(expected, abs=1e-4)
    assert (found["threshold"], found["task"], found["protocol"], found["fit"]) == (0.4, "single", "family", "squash")
    assert (found["resolution"], found["image_size"]) == (resolution, SIZE)


@pytest.mark.parametrize("resolution", ["input", "original"])
def test_an_oracle_scores_full_marks_and_fails_the_control(resolution: str) -> None:
    """With each sentence's words lent by another, the same oracle is wrong: the score follows the words."""

    class Shuffled(FakeDataset):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "text": super().__getitem__((index + 7) % len(self))["text"]}

    options = {"sizes": ((20, 24),), "original": True}
    dataset = FakeDataset(**options)
    oracle = Oracle(dataset, "mask" if resolution == "input" else "original_mask")
    found = evaluate(oracle, dataset, 5, resolution=resolution, fast=False)
    assert found["oIoU"] == found["mIoU"] == found["P@0.9"] == 100
    control = evaluate(oracle, Shuffled(**options), 5, resolution=resolution, fast=False)
    assert control["mIoU"] < 50
    assert control["sentences"] == found["sentences"]


@pytest.mark.parametrize("presence", [False, True])
@pytest.mark.parametrize("protocol", ["family", "gres"])
def test_a_perfect_model_has_full_marks_on_sentences_without_target(presence: bool, protocol: str) -> None:
    dataset = FakeDataset(negatives=True)
    oracle = Oracle(dataset, presence=presence)
    found = evaluate(oracle, dataset, 5, task="generalized", protocol=protocol, fast=False)
    assert [found[name] for name in TASKS["generalized"].scores] == [100] * 7
    found = evaluate(oracle, dataset, 5, task="robust", fast=False)
    assert [found[name] for name in TASKS["robust"].scores] == [100] * len(TASKS["robust"].scores)


def test_region_by_hand() -> None:
    """A model that is sure of one pixel, whatever it is told."""
    logits = torch.full((1, SIZE, SIZE), -5.0)
    logits[0, 2, 3] = 5
    dataset = FakeDataset(12)
    found = evaluate(Says(Prediction(logits)), dataset, 1, task="region", fast=False)
    hits = [bool(dataset[index]["mask"][2, 3]) for index in range(12)]
    assert 0 < sum(hits) < 12
    assert found["pointing"] == pytest.approx(100 * sum(hits) / 12)


def _score_as_one_of_two(rank: int, folder: Path, limit: int, task: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = evaluate(seeded(True), FakeDataset(9, negatives=True), 2, limit=limit, task=task, fast=False)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("limit", "task"), [(9, "single"), (9, "robust"), (1, "single")])
def test_two_processes_share_the_sentences(tmp_path: Path, limit: int, task: str) -> None:
    """An odd number, and fewer than processes: none is scored twice, both processes get the whole result, exactly.

    Refs are shared out over the processes, too: rIoU is that of the refs, not of their halves.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_score_as_one_of_two, args=(r, tmp_path, limit, task)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = evaluate(seeded(True), FakeDataset(9, negatives=True), 2, limit=limit, task=task, fast=False)
    assert alone["sentences"] == limit
    assert alone["mIoU"] > 1
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == json.dumps(alone)


def test_progress_and_mode() -> None:
    calls: list[tuple[int, int]] = []
    model = seeded().train()
    evaluate(model, FakeDataset(), 3, limit=8, fast=False, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 8), (6, 8), (8, 8)]
    assert model.training


def test_loader_processes_change_nothing() -> None:
    model, dataset = seeded(), FakeDataset(8)
    options = {"batch_size": 3, "fast": False}
    assert evaluate(model, dataset, workers=1, **options) == evaluate(model, dataset, **options)


def test_the_generator_of_a_run_is_left_alone() -> None:
    model = seeded()
    before = torch.get_rng_state()
    evaluate(model, FakeDataset(3), fast=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_goes_on_after_an_evaluation() -> None:
    """Nothing that evaluation leaves in the model forbids gradients."""

    class Keeps(FakeModel):
        """Keeps a tensor from one call to the next, as models do with positions and masks."""

        kept = None

        def forward(self, image, text, context=None):
            self.kept = torch.ones(1) if self.kept is None else self.kept
            prediction = super().forward(image, text, context)
            return prediction._replace(mask=prediction.mask * self.kept)

    model, sample = Keeps(), FakeDataset()[0]
    evaluate(model, FakeDataset(), limit=2, fast=False)
    text = type(sample["text"])(*(part[None] for part in sample["text"]))
    model(sample["image"][None], text).mask.sum().backward()
    assert model.mask.weight.grad.abs().sum() > 0


def test_context_reaches_the_model_and_is_asked_for_by_name() -> None:
    class WithEdges(FakeDataset):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "extra": {"edges": torch.full((3,), float(index))}}

    class Reads(FakeModel):
        needs = ("edges", "proposals")
        seen: list = []  # noqa: RUF012

        def forward(self, image, text, context=None):
            self.seen.append(context)
            return super().forward(image, text, context)

    model = Reads()
    with pytest.raises(ValueError, match="dataset: the model reads proposals beside image and text"):
        evaluate(model, WithEdges(), limit=2, fast=False)
    assert model.seen == []
    Reads.needs = ("edges",)
    evaluate(model, WithEdges(), limit=2, fast=False)
    assert torch.equal(model.seen[0]["edges"][:, 0], torch.tensor([0.0, 1.0]))
    plain = Reads()
    Reads.needs, Reads.seen = (), []
    evaluate(plain, FakeDataset(), limit=2, fast=False)
    assert plain.seen == [None]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("where", ["mask", "presence"])
@pytest.mark.parametrize("resolution", ["input", "original"])
def test_nan_is_no_answer(where: str, resolution: str, autocast: torch.dtype | None) -> None:
    """Neither in the mask nor in the flag, where it compares as "nothing is named"; the first sentence is named."""

    class Breaks(FakeModel):
        def forward(self, image, text, context=None):
            prediction = super().forward(image, text, context)
            spoilt = getattr(prediction, where).clone()
            spoilt[text.ids[:, 0] >= 5] = torch.nan
            return prediction._replace(**{where: spoilt})

    dataset = FakeDataset(8, original=True)
    with pytest.raises(ValueError, match="prediction: NaN in that of sentence 5, and of 2 others"):
        evaluate(Breaks(True), dataset, 3, resolution=resolution, autocast=autocast, fast=False)
    assert evaluate(Breaks(True), dataset, 3, limit=5, resolution=resolution, fast=False)["sentences"] == 5


def test_the_model_is_fast_for_the_time_of_the_call(monkeypatch) -> None:
    """Accelerated unless declined, in evaluation mode, and put back whatever happens."""
    events: list[str] = []

    @contextmanager
    def accelerated(model: nn.Module, **options: object):
        events.append(f"fast, training={model.training}")
        try:
            yield
        finally:
            events.append("plain")

    module = ModuleType("magnet_fast.fast")
    module.accelerated = accelerated
    monkeypatch.setitem(sys.modules, "magnet_fast.fast", module)
    evaluate(seeded(), FakeDataset(), limit=2)
    assert events == ["fast, training=False", "plain"]

    class Fails(FakeModel):
        def forward(self, image, text, context=None):
            raise RuntimeError("broken")

    model = Fails().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, FakeDataset(), limit=2)
    assert events[2:] == ["fast, training=False", "plain"] and model.training
    evaluate(seeded(), FakeDataset(), limit=2, fast=False)
    assert len(events) == 4


def test_fast_and_plain_agree() -> None:
    dataset = FakeDataset(6)
    assert numbers(evaluate(seeded(), dataset)) == pytest.approx(numbers(evaluate(seeded(), dataset, fast=False)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": "full"}, "resolution: expected one of input, original, got 'full'"),
        ({"protocol": "ours"}, "protocol: expected one of family, gres, cris, got 'ours'"),
        ({"task": "multi"}, "task: expected one of single, generalized, robust, region, got 'multi'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"limit": 0}, "no sentence to evaluate"),
        (
            {"resolution": "original"},
            "dataset: resolution 'original' needs masks at the images' own size; open it with",
        ),
        ({"protocol": "gres", "task": "robust"}, "task: protocol 'gres' is for generalized and single, got 'robust'"),
        (
            {"protocol": "gres", "resolution": "original"},
            "protocol 'gres' compares at resolution input, got 'original'",
        ),
        ({"protocol": "cris"}, "resolution: protocol 'cris' compares at resolution original, got 'input'"),
        ({"protocol": "cris", "task": "generalized"}, "task: protocol 'cris' is for single, got 'generalized'"),
        (
            {"protocol": "cris", "resolution": "original"},
            "dataset: protocol 'cris' at resolution 'original' is for images fitted by letterbox; "
            "this one's are fitted by squash",
        ),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(seeded(), FakeDataset(), fast=False, **arguments)


@pytest.mark.parametrize("kind", ["letterbox", "longest"])
def test_other_fits_are_compared_at_the_images_own_size_only(kind: str) -> None:
    """At the canvas their borders would be scored."""
    dataset = FakeDataset(4, sizes=((16, 8), (10, 16)), original=True)
    dataset.spec, dataset.fit = InputSpec(size=SIZE, fit=kind), Middle()
    with pytest.raises(ValueError, match="'family' at resolution 'input' is for images fitted by squash"):
        evaluate(seeded(), dataset, fast=False)
    found = evaluate(seeded(), dataset, 3, resolution="original", fast=False)
    assert found["fit"] == kind
    inside, union = 0, 0
    with torch.no_grad():
        for index in range(4):
            sample = dataset[index]
            text = type(sample["text"])(*(part[None] for part in sample["text"]))
            canvas = probability(seeded()(sample["image"][None], text), (SIZE, SIZE))[0]
            mask, truth = dataset.fit.back(canvas, sample["size"]) > 0.4, sample["original_mask"].bool()
            inside, union = inside + (mask & truth).sum().item(), union + (mask | truth).sum().item()
    assert found["oIoU"] == pytest.approx(100 * inside / union, abs=0.02)


def test_results_are_written_as_json() -> None:
    """Numbers, strings and None only; what is not defined comes back as NaN."""
    found = json.loads(json.dumps(evaluate(seeded(), FakeDataset(4), task="generalized", fast=False)))
    assert math.isnan(found["N-acc"]) and isinstance(found["rules"], str)
    assert np.isfinite(found["gIoU"])
