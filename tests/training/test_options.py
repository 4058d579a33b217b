"""Options of a run: averaged weights, recomputed activations, determinism, loss scaling, BatchNorm, TensorBoard."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from magnet_fast import models
from magnet_fast.data.tokenizers import Tokenizer
from magnet_fast.training import Trainer, progress
from magnet_fast.training.averaging import WeightAverage
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.config import parse_config
from magnet_fast.training.determinism import deterministic_algorithms
from magnet_fast.training.distributed import World
from magnet_fast.training.objective import Objective
from magnet_fast.training.parallel import synchronise_batch_norm
from magnet_fast.training.recomputation import recompute_activations
from magnet_fast.training.terms import build_terms

from .fakes import SMALL_MAGNET, FakeDataset, FakeModel, fake_config, same_weights, trainer_of


def make_trainer(out, **changes) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(11)
    return trainer_of(fake_config(**changes), FakeModel(dropout=0.1), FakeDataset(24), FakeDataset(7), out)


# ---- averaged weights ----


def test_the_average_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = WeightAverage(model, decay=0.25)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(5):
        model(torch.randn(4, 2))  # moves the statistics
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 2))
        average.update()
        decay = min(0.25, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    assert average.weights["1.num_batches_tracked"] == 5  # a count is copied
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(average.weights[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_exchange_gives_back_the_weights_bit_for_bit() -> None:
    model = FakeModel()
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.image_encoder.patches.weight.mul_(3)
    own, averaged = copy.deepcopy(model.state_dict()), copy.deepcopy(average.weights)
    with pytest.raises(KeyError), average.in_place():
        assert same_weights(dict(model.state_dict()), averaged)
        raise KeyError
    assert same_weights(dict(model.state_dict()), dict(own)) and same_weights(average.weights, averaged)


def test_averaged_weights_are_validated_saved_and_resumed(tmp_path) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.run()
    whole = make_trainer(tmp_path / "whole", ema=0.8)
    scores = whole.run()
    assert same_weights(dict(plain.model.state_dict()), dict(whole.model.state_dict()))  # training is the same
    validated = [
        [row["mIoU"] for row in trainer.log.metrics.rows() if row["kind"] == "validation"] for trainer in (plain, whole)
    ]
    assert validated[0] != validated[1]
    state = load_checkpoint(tmp_path / "whole" / CHECKPOINT)
    assert state["ema"]["updates"] == 9 and same_weights(state["ema"]["weights"], whole.average.weights)

    half = make_trainer(tmp_path / "half", ema=0.8)
    after = half._after_step

    def stop() -> None:
        after()
        if half.step == 5:
            raise KeyboardInterrupt

    half._after_step = stop
    with pytest.raises(KeyboardInterrupt):
        half.run()
    resumed = make_trainer(tmp_path / "half", ema=0.8)
    resumed.load_state(load_checkpoint(tmp_path / "half" / CHECKPOINT))
    assert resumed.run() == scores
    assert same_weights(resumed.average.weights, whole.average.weights)


# ---- recomputed activations ----


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recomputing_changes_no_bit(precision: str) -> None:
    """With dropout and stochastic depth, in all encoders and in the predictor."""
    torch.manual_seed(0)
    overrides = {**SMALL_MAGNET, "text__dropout": 0.2, "image__drop_path": 0.3}
    terms = {"grounding": {"layers": 1, "heads": 4, "feedforward": 32}}
    config = parse_config({"terms": terms, "epochs": 1})
    tokenizer = Tokenizer(max_tokens=8)
    model = models.create("magnet_tiny", **overrides)
    objective = Objective(model, build_terms(config.terms, model, tokenizer), precision).train()
    batch = {
        "image": torch.randn(2, 3, 32, 32),
        "text": tokenizer(["the red circle", "blue square"]),
        "mask": torch.ones(2, 32, 32),
        "exists": torch.ones(2, dtype=torch.bool),
    }
    results, kept = [], []
    for recompute in (False, True):
        if recompute:
            recompute_activations(objective.repeated_layers())
        bytes_kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        torch.manual_seed(1)
        objective.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = objective(batch)["total"]
        total.backward()
        results.append(
            (total.detach(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None})
        )
        kept.append(bytes_kept)
    layers = objective.repeated_layers()
    # Swin's blocks, BERT's layers, those of both decoders, and of the predictor of hidden words.
    assert len(layers) == len(set(layers)) == 8 + 4 + 1 + 3 + 1
    assert torch.equal(results[0][0], results[1][0])
    assert same_weights(results[0][1], results[1][1])
    assert kept[1] < 0.7 * kept[0]


# ---- determinism ----


def test_determinism_holds_for_the_run_alone(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


# ---- loss scaling ----


def test_a_scale_too_large_skips_steps_and_finds_the_right_one(tmp_path) -> None:
    trainer = make_trainer(tmp_path, precision="fp16", max_steps=40, log_every=1, clip_norm=1.0, validate_every="never")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    weights = [copy.deepcopy(trainer.model.state_dict())]
    after = trainer._after_step

    def keep() -> None:
        weights.append(copy.deepcopy(trainer.model.state_dict()))
        after()

    trainer._after_step = keep
    trainer.run()
    rows = trainer.log.metrics.rows()
    skipped = [row["grad_norm"] is None for row in rows]  # written so where it is infinite
    assert skipped[0] and not skipped[-1]
    for step, skip in enumerate(skipped):
        assert same_weights(dict(weights[step]), dict(weights[step + 1])) == skip
    assert trainer.scaler.get_scale() == 2.0 ** (40 - sum(skipped))
    assert all(row["loss"] is not None for row in rows)
    # What is clipped and logged is the gradient without the scale.
    assert 0.01 < rows[-1]["grad_norm"] < 100


# ---- BatchNorm ----


def test_batch_norms_see_all_processes_on_gpus() -> None:
    world = World(0, 2, torch.device("cuda", 0))
    lavt = models.create("lavt_tiny")
    before = dict(lavt.named_parameters())
    names = list(lavt.state_dict())
    count = sum(isinstance(module, nn.BatchNorm2d) for module in lavt.modules())
    found = synchronise_batch_norm(lavt, world)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in found.modules()) == count > 0
    assert list(found.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in found.named_parameters())
    for other in (World(0, 1, torch.device("cuda", 0)), World(0, 2, torch.device("cpu"))):
        assert not any(
            isinstance(m, nn.SyncBatchNorm) for m in synchronise_batch_norm(models.create("lavt_tiny"), other).modules()
        )


# ---- TensorBoard ----


def test_without_tensorboard_the_run_does_not_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'magnet_fast\[logging\]'"):
        progress.check_tensorboard()


def test_tensorboard_gets_every_number(tmp_path, monkeypatch) -> None:
    written: list[tuple] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(progress, "check_tensorboard", lambda: None)
    trainer = make_trainer(tmp_path, tensorboard=True)
    trainer.run()
    assert written[0] == ("open", str(tmp_path / "tensorboard"), 1) and written[-1] == ("close",)
    rows = trainer.log.metrics.rows()
    losses = [(value, step) for name, value, step in written[1:-1] if name == "train/loss"]
    assert losses == [(row["loss"], row["step"]) for row in rows if row["kind"] == "train"]
    kinds = [value for name, value, _ in written[1:-1] if name == "validation/by_kind/even/mIoU"]
    assert kinds == [row["by_kind"]["even"]["mIoU"] for row in rows if row["kind"] == "validation"]
