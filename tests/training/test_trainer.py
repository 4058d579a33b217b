"""The loop itself, on a model of a few numbers: equivalences, metrics, failures, resuming bit for bit."""

from __future__ import annotations

import copy
import math
import multiprocessing
import random
import subprocess
from typing import ClassVar

import pytest
import torch

from magnet_fast.evaluation import evaluate
from magnet_fast.models import Text, probability
from magnet_fast.training import Trainer, TrainingError
from magnet_fast.training import trainer as trainer_module
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.progress import MetricsFile, duration, time_left
from magnet_fast.training.terms import Term, TermConfig, build_terms
from magnet_fast.training.terms.mask import MaskConfig

from .fakes import FakeDataset, FakeModel, fake_config, same_weights, trainer_of


def make_trainer(out, dropout: float = 0.1, length: int = 24, validation: int | None = 7, **changes) -> Trainer:
    torch.manual_seed(11)
    held_out = None if validation is None else FakeDataset(validation)
    return trainer_of(fake_config(**changes), FakeModel(dropout=dropout), FakeDataset(length), held_out, out)


def finished_weights(out) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "checkpoint.safetensors")["model"]


@pytest.mark.slow
def test_training_learns(tmp_path) -> None:
    trainer = make_trainer(tmp_path, dropout=0.0, epochs=40, optimiser={"lr": 3e-2}, best_metric="mIoU")
    before = evaluate(trainer.model, FakeDataset(24))["mIoU"]
    trainer.run()
    after = evaluate(trainer.model, FakeDataset(24))["mIoU"]
    assert after > before + 30
    losses = [row["loss"] for row in trainer.log.metrics.rows() if row["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


def test_one_step_equals_adamw_by_hand(tmp_path) -> None:
    """First step of AdamW: the weight moves by lr times its gradient's sign, after the decay."""
    config = {"max_steps": 1, "clip_norm": None, "validate_every": "never"}
    trainer = make_trainer(tmp_path, dropout=0.0, validation=None, **config)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.run()
    weight, gradient = trainer.model.image_encoder.patches.weight, trainer.model.image_encoder.patches.weight.grad
    expected = before["image_encoder.patches.weight"] * (1 - 1e-2 * 0.01) - 1e-2 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(weight, expected, atol=1e-6)
    assert torch.equal(trainer.model.head.unused.weight, before["head.unused.weight"])


def test_multipliers_count_from_a_share_of_the_run(tmp_path, monkeypatch) -> None:
    seen = []
    trainer = make_trainer(
        tmp_path,
        validation=None,
        max_steps=4,
        validate_every="never",
        optimiser={"lr": 1.0, "image_multiplier": 0.5, "multiply_from": 0.5},
        schedule={"power": 0},
    )
    step = trainer.optimiser.step

    def watched() -> None:
        seen.append({group["lr"] for group in trainer.optimiser.param_groups})
        step()

    monkeypatch.setattr(trainer.optimiser, "step", watched)
    trainer.run()
    assert seen == [{1.0}, {1.0}, {1.0, 0.5}, {1.0, 0.5}]


def test_accumulation_equals_one_batch(tmp_path) -> None:
    weights = []
    for accumulation in (1, 2, 4):
        out = tmp_path / str(accumulation)
        out.mkdir()
        trainer = make_trainer(out, dropout=0.0, accumulation=accumulation, clip_norm=0.5)
        trainer.run()
        weights.append(trainer.model.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert torch.allclose(value, other[name], atol=2e-5), name


def test_clipping_bounds_the_gradient(tmp_path) -> None:
    trainer = make_trainer(tmp_path, clip_norm=0.01, max_steps=1, log_every=1)
    trainer.run()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert trainer.log.metrics.rows()[0]["grad_norm"] > 0.01  # logged before clipping


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_close_to_float32(tmp_path, precision: str) -> None:
    rows = {}
    for chosen in ("float32", precision):
        (tmp_path / chosen).mkdir()
        trainer = make_trainer(tmp_path / chosen, dropout=0.0, precision=chosen)
        trainer.run()
        rows[chosen] = [row["loss"] for row in trainer.log.metrics.rows() if row["kind"] == "train"]
    assert rows[precision] == pytest.approx(rows["float32"], rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_metrics_rows(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    scores = trainer.run()
    rows = trainer.log.metrics.rows()
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train_rows] == [2, 4, 6, 8, 9]
    assert all(
        {"epoch", "loss", "bce", "dice", "presence", "grad_norm", "lr", "images_per_second"} <= row.keys()
        for row in train_rows
    )
    assert train_rows[0]["lr"] == pytest.approx(1e-2 * (1 - 1 / 9) ** 0.9)
    validation = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in validation] == [3, 6, 9]
    assert validation[-1]["oIoU"] == pytest.approx(scores["oIoU"])
    assert validation[-1]["sentences"] == 7
    assert (tmp_path / "best.safetensors").exists()
    assert (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize("stop", range(1, 9))
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop: int) -> None:
    """Stopped at any step (between checkpoints, in mid-epoch, in the middle of a log window), with dropout."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = make_trainer(whole).run()

    class Killed(BaseException):
        pass

    first = make_trainer(broken)
    after_step = first._after_step

    def die() -> None:
        after_step()
        if first.step == stop:
            raise Killed

    first._after_step = die
    with pytest.raises(Killed):
        first.run()
    random.seed(0)
    torch.manual_seed(99)
    second = make_trainer(broken)
    if (broken / "checkpoint.safetensors").exists():
        second.load_state(load_checkpoint(broken / "checkpoint.safetensors"))
    else:
        assert stop < 2
        second.log.metrics.drop_after(0)
    assert second.run() == expected
    assert same_weights(finished_weights(whole), finished_weights(broken))
    one, other = load_checkpoint(whole / "checkpoint.safetensors"), load_checkpoint(broken / "checkpoint.safetensors")
    for name, state in one["optimiser"]["state"].items():
        assert all(torch.equal(state[key], other["optimiser"]["state"][name][key]) for key in state)

    def comparable(out) -> list[dict]:
        rows = MetricsFile(out / "metrics.jsonl").rows()
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]

    assert comparable(broken) == comparable(whole)


def test_without_dropout_state_the_resumed_run_would_differ(tmp_path) -> None:
    """The equality above has teeth: with another generator state it does not hold."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    make_trainer(first).run()
    trainer = make_trainer(second)
    torch.manual_seed(1234)
    trainer.run()
    assert not same_weights(finished_weights(first), finished_weights(second))


def test_a_broken_metrics_line_is_dropped_on_resume(tmp_path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (2, 4, 6):
        file.append({"kind": "train", "step": step, "loss": 1.0})
    with open(file.path, "a") as handle:
        handle.write('3\n[]\n{"step": "4"}\n{"kind": "train", "ste')  # and what somebody else wrote
    file.drop_after(4)
    assert [row["step"] for row in file.rows()] == [2, 4]
    file.append({"kind": "train", "step": 6, "loss": math.nan})
    assert file.rows()[-1] == {"kind": "train", "step": 6, "loss": None}


def test_nan_stops_before_a_checkpoint(tmp_path) -> None:
    trainer = make_trainer(tmp_path, checkpoint_every=3, log_every=100)
    train_step = trainer.train_step

    def spoil(batches) -> None:
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.head.mask.weight.fill_(math.nan)
        train_step(batches)

    trainer.train_step = spoil
    with pytest.raises(
        TrainingError, match=f"loss.*became NaN or infinite in step 5, found after step 5.*{CHECKPOINT} is of step 3"
    ):
        trainer.run()
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["step"] == 3
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_checkpoint_of_another_model_or_data_is_refused(tmp_path) -> None:
    make_trainer(tmp_path).run()
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    wider = trainer_of(fake_config(), FakeModel(width=4), FakeDataset(), None, tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        wider.load_state(state)
    with pytest.raises(ValueError, match="of another model"):
        make_trainer(tmp_path).load_state({**state, "model_config": {"width": "narrow"}})
    before = {**state, "model_config": {}}  # of a version whose models knew no width
    make_trainer(tmp_path).load_state(before)
    with pytest.raises(ValueError, match="of another model"):
        wider.load_state(before)
    more = trainer_of(fake_config(), FakeModel(), FakeDataset(80), None, tmp_path)
    with pytest.raises(ValueError, match="3 steps an epoch, this one has 10"):
        more.load_state(state)


def test_a_run_by_the_clock_ends_and_decays(tmp_path) -> None:
    config = {"epochs": None, "max_minutes": 0.6 / 60, "validate_every": "never", "log_every": 1}
    trainer = make_trainer(tmp_path, **config)
    trainer.run()
    rates = [row["lr"] for row in trainer.log.metrics.rows()]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
    # The time already spent counts after resuming: nothing is left here.
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["trained_seconds"] > 0
    resumed = make_trainer(tmp_path, **config)
    resumed.load_state({**state, "trained_seconds": 0.6})
    resumed.run()
    assert resumed.step == state["step"]


def test_terms_are_told_how_far_the_run_is(tmp_path) -> None:
    class Listening(Term):
        heard: ClassVar[list[float]] = []

        def forward(self, prediction, batch, model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            self.heard.append(batch["progress"].item())
            return prediction.mask.mean(), {}

    config = fake_config(max_steps=4, accumulation=2, validate_every="never")
    Trainer(config, FakeModel(), {"listening": Listening(TermConfig())}, FakeDataset(), None, tmp_path).run()
    assert Listening.heard == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_frozen_parameters_stay(tmp_path) -> None:
    trainer = make_trainer(tmp_path, optimiser={"lr": 1e-2, "freeze": ["text_encoder.words.*"]})
    before = trainer.model.text_encoder.words.weight.clone()
    trainer.run()
    assert torch.equal(trainer.model.text_encoder.words.weight, before)


@pytest.mark.slow
def test_compiled_step_gives_the_same_losses(tmp_path, monkeypatch) -> None:
    """What is compiled is model and losses together; traced by dynamo and run eagerly, for speed."""
    compiled = []
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module, *args, **kwargs) -> None:
        compiled.append(module)
        compile_module(module, backend="eager", fullgraph=True)

    rows = []
    for compile_ in (False, True):
        (tmp_path / str(compile_)).mkdir()
        monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
        trainer = make_trainer(tmp_path / str(compile_), dropout=0.0, compile=compile_)
        trainer.run()
        rows.append([row["loss"] for row in trainer.log.metrics.rows() if row["kind"] == "train"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    assert len(compiled) == 1


def test_validation_does_not_disturb_training(tmp_path) -> None:
    weights = []
    for every in ("1 steps", "never"):
        (tmp_path / every).mkdir()
        trainer = make_trainer(tmp_path / every, validate_every=every)
        trainer.run()
        weights.append(trainer.model.state_dict())
    assert same_weights(*weights)


def test_loader_processes_survive_a_signal_to_all_of_the_job(tmp_path) -> None:
    trainer = make_trainer(tmp_path, data={"workers": 1})
    batches = iter(trainer.loader(0, 0))
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", str(worker.pid)], check=True)  # of another process than ours
    rest = list(batches)
    assert len(rest) == 2 and len(first["image"]) == 8
    worker.terminate()  # of ours
    worker.join(timeout=30)
    assert worker.exitcode == 0


def test_the_time_left_never_runs_below_zero() -> None:
    """A run by the clock ends a little after its time: "-1 h 59 min left" stood at the end of every one."""
    assert time_left(30.0, 0.25) == 90.0
    assert time_left(360.4, 1.001) == 0.0 and time_left(5.0, 0.0) is None


def test_the_line_at_the_end_of_a_run_by_the_clock(tmp_path, capsys) -> None:
    config = {"epochs": None, "max_minutes": 0.2 / 60, "validate_every": "never", "log_every": 1}
    make_trainer(tmp_path, **config).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert lines and not any("-" in line.split("images/s")[1] for line in lines)
    # The clock may end the run a moment after its last line: how near to 100 % that was is the machine's affair.
    assert all(float(line.split("%")[0]) <= 100.0 for line in lines)


def test_a_rehearsal_validates_as_the_run_does(tmp_path) -> None:
    """Scores, precision and loaders as configured, and what the terms measure: only the sentences are fewer."""
    calls: list[dict] = []

    class Measuring(type(build_terms({}, FakeModel(), None)["mask"])):
        def measure(self, model, dataset, batch_size, **options):
            calls.append({"batch_size": batch_size, **options})
            return {"seen": {"sentences": float(len(calls))}}

    config = fake_config(
        precision="bf16", eval_batch_size=4, task="generalized", protocol="gres", data={"val_limit": 6}, max_steps=1
    )
    trainer = Trainer(config, FakeModel(), {"mask": Measuring(MaskConfig())}, FakeDataset(), FakeDataset(9), tmp_path)
    assert trainer.rehearse_validation() == 4
    scores = trainer.run()
    assert [call.pop("limit") for call in calls] == [4, 6]
    assert calls[0] == calls[1] == {"batch_size": 4, "workers": 0, "autocast": torch.bfloat16}
    assert scores["seen"] == {"sentences": 2.0} and {"gIoU", "N-acc"} <= scores.keys()
    assert trainer.best == scores["gIoU"]


@pytest.mark.parametrize("fast", [True, False])
def test_the_model_is_accelerated_unless_declined(tmp_path, monkeypatch, fast: bool) -> None:
    seen: list[object] = []
    monkeypatch.setattr(trainer_module, "accelerate", seen.append)
    trainer = make_trainer(tmp_path, fast=fast)
    assert seen == ([trainer.model] if fast else [])


def test_durations() -> None:
    assert [duration(s) for s in (12.4, 200, 3725)] == ["12 s", "3 min 20 s", "1 h 02 min"]


def test_fake_model_reads_its_words() -> None:
    """The fake must be able to fail: its output depends on image and words."""
    item = FakeDataset()[0]
    model, image = FakeModel(), item["image"][None]
    ids, mask = (part[None] for part in item["text"])
    one, other = model(image, Text(ids, mask)), model(image, Text((ids + 1) % 50, mask))
    assert not torch.equal(one.mask, other.mask)
    assert probability(one, (16, 16)).shape == (1, 16, 16)
