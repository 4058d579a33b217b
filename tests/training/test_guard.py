"""The guard against NaN and infinity: which step, which batch, and no waiting."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from magnet_fast.training import TrainingError
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.guard import NonFiniteGuard

from .fakes import FakeDataset, FakeModel, fake_config, trainer_of

BROKEN = 13


class BrokenDataset(FakeDataset):
    """One item holds an infinite pixel."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        if index == BROKEN:
            item["image"][1, 2, 3] = math.inf
        return item

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_the_first_bad_step_and_its_values_are_kept() -> None:
    guard = NonFiniteGuard(("loss", "bce", "norm"), ("loss", "bce"), torch.device("cpu"))
    guard.watch(1, torch.tensor([1.0, 2.0, math.inf]))  # the norm is not watched
    assert guard.first() is None
    guard.watch(2, torch.tensor([1.0, -math.inf, 3.0]))
    guard.watch(3, torch.tensor([math.nan, math.nan, math.nan]))
    assert guard.first() == (2, {"loss": 1.0, "bce": -math.inf, "norm": 3.0})


def test_watching_reads_nothing_from_the_device() -> None:
    """On fake tensors, whose values nobody can read, `watch` works and `first` does not."""
    with FakeTensorMode():
        guard = NonFiniteGuard(("loss",), ("loss",), torch.device("cpu"))
        guard.watch(1, torch.ones(1))
        with pytest.raises(DataDependentOutputException):
            guard.first()


@pytest.mark.parametrize("late", [False, True])
def test_the_batch_is_named_and_saved(tmp_path, monkeypatch, late: bool) -> None:
    """At once on the CPU; as on a GPU, when losses are read: the same step and batch, no checkpoint between."""
    torch.manual_seed(0)  # of 256 models one reads no channel of an infinite pixel
    config = fake_config(log_every=4, checkpoint_every=3, accumulation=2, validate_every="never", max_steps=12)
    trainer = trainer_of(config, FakeModel(), BrokenDataset(24), None, tmp_path)
    if late:
        first = trainer.guard.first
        reading = {"losses": False}
        checked = trainer._checked_means

        def check() -> dict:
            reading["losses"] = True
            return checked()

        monkeypatch.setattr(trainer, "_checked_means", check)
        monkeypatch.setattr(trainer.guard, "first", lambda: first() if reading["losses"] else None)
    with pytest.raises(TrainingError, match="loss and bce.*NaN or infinite in step") as raised:
        trainer.run()
    batches = [index for step in range(3) for index in list(trainer._batches(0))[2 * step : 2 * step + 2]]
    step = 1 + next(number for number, batch in enumerate(batches) if BROKEN in batch) // 2
    assert f"in step {step}, found after step {trainer.step};" in str(raised.value)
    assert trainer.step == (3 if late and step < 4 else step)  # before the checkpoint of step 3 at the latest

    folder = tmp_path / "nonfinite"
    facts = json.loads((folder / f"step-{step}-rank-0.json").read_text())
    saved = load_file(folder / f"step-{step}-rank-0.safetensors")
    place = facts["indices"].index(BROKEN)
    assert len(facts["indices"]) == 8 and facts["epoch"] == 0 and facts["position"] == step - 1
    expected = BrokenDataset()[BROKEN]
    assert facts["samples"][place] == {
        "exists": True, "index": BROKEN, "ref": BROKEN // 2, "image_id": 100 + BROKEN, "kind": None, "category": None,
        "size": [16, 16],
    }  # fmt: skip
    assert facts["values"]["loss"] in ("nan", "inf")
    for key in ("image", "mask"):
        assert torch.equal(saved[key][place], expected[key])
    assert torch.equal(saved["text.ids"][place], expected["text"].ids)
    if (tmp_path / CHECKPOINT).exists():
        state = load_checkpoint(tmp_path / CHECKPOINT)
        assert state["step"] < step and all(value.isfinite().all() for value in state["model"].values())


def test_sentences_are_those_of_the_epoch_that_failed(tmp_path) -> None:
    """In mode "refs" a batch can only be read again with its own epoch's sentences."""
    config = fake_config(epochs=4, data={"mode": "refs"}, validate_every="never")
    dataset = BrokenDataset(24)
    trainer = trainer_of(config, FakeModel(), dataset, None, tmp_path)
    trainer.guard.watch(5, torch.full((5,), math.nan))  # 3 steps an epoch
    trainer.step = 10
    with pytest.raises(TrainingError, match="in step 5, found after step 10"):
        trainer._stop_if_bad(True)
    assert dataset.epoch == 1
