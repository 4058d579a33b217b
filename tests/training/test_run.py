"""Whole runs of a real, small MagNet on embedded scenes: folders, resuming, two processes, a dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from magnet_fast import checkpoints, cli, models
from magnet_fast.data import ExpressionDataset
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.scenes import write_scenes
from magnet_fast.data.tokenizers import open_tokenizer
from magnet_fast.evaluation import evaluate
from magnet_fast.models.base import ReferringModel
from magnet_fast.training import load_config, train
from magnet_fast.training.building import build_model
from magnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from magnet_fast.training.dry_run import dry_run
from magnet_fast.training.progress import MetricsFile

from .fakes import SMALL_MAGNET, same_weights
from .processes import environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Bit for bit means: with the same number of threads, here and in the processes that the tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return Path(write_scenes(tmp_path_factory.mktemp("scenes"), 24, 3, level="easy", image_size=64))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, scenes) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    values = {
        "model": {"name": "magnet_tiny", "overrides": {**SMALL_MAGNET, "text__dropout": 0.1}},
        "data": {"root": str(scenes), "image_size": 32, "max_tokens": 12, "cache": True},
        "optimiser": {"lr": 1e-3, "eps": 1e-3},
        "max_steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "validate_every": "never",
        "log_every": 1,
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(values))
    return path


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "checkpoint.safetensors")["model"]


@pytest.mark.slow
def test_two_processes_equal_one(config_file, scenes, tmp_path) -> None:
    """The same global batch on two gloo processes: the same losses, weights and validation scores.

    They are started by the old launcher, which adds `--local-rank`; `make demo` starts its own by torchrun.
    """
    changes = [
        "model.overrides.text__dropout=0.0",
        "accumulation=2",
        "batch_size=8",
        "validate_every=3 steps",
        "clip_norm=1.0",
        "data.mode=refs",
        "terms.alignment.weight=0.5",
        "precision=float32",
    ]
    flags = [argument for change in changes for argument in ("--set", change)]
    launch = [sys.executable, "-m", "torch.distributed.launch", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "magnet_fast", "train", "--config", str(config_file), *flags]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.count("cpu x 2 processes") == 1  # one process talks
    one = train(load_config(config_file, changes), tmp_path / "one")

    found = weights(tmp_path / "two")
    # Sums taken in another order differ in the last bits, and the decoder's hard masks enlarge that; six steps move
    # a weight by up to 4e-3. That the gradients have the right scale, which AdamW forgives, shows in their norm.
    for name, value in weights(tmp_path / "one").items():
        assert torch.allclose(value, found[name], rtol=0, atol=4e-4), name
    rows, expected = (MetricsFile(tmp_path / out / "metrics.jsonl").rows() for out in ("two", "one"))
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        if row["kind"] == "train":
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    assert len(load_checkpoint(tmp_path / "two" / "checkpoint.safetensors")["rng"]) == 2

    # Two processes score each sentence once.
    model = models.load(tmp_path / "two" / "last.safetensors")
    assert (model.spec.size, model.spec.max_tokens) == (32, 12)
    tokenizer = open_tokenizer(model.spec.tokenizer, max_tokens=12)
    dataset = ExpressionDataset(open_reader(scenes, "refcoco"), "val", tokenizer, model.spec)
    alone = evaluate(model, dataset)
    validation = [row for row in rows if row["kind"] == "validation"][-1]
    assert validation["sentences"] == alone["sentences"] == len(dataset) == one["sentences"]
    for name in ("oIoU", "mIoU", "P@0.5"):
        assert validation[name] == pytest.approx(alone[name], abs=0.05)

    # A checkpoint of two processes goes on with one.
    more = [*changes, "log_every=2"]
    scores = {key: value for key, value in validation.items() if key not in ("kind", "step", "epoch")}
    assert train(load_config(config_file, more), tmp_path / "two", resume=True) == scores


def test_files_of_a_run(config_file, tmp_path) -> None:
    config = load_config(config_file, ["max_steps=2", "validate_every=2 steps"])
    scores = train(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoint.safetensors", "best.safetensors", "last.safetensors",
    }  # fmt: skip
    assert load_config(tmp_path / "run" / "config.yaml") == config
    loaded = checkpoints.load(tmp_path / "run" / "best.safetensors")
    model = loaded.model
    assert (model.spec.size, model.spec.max_tokens, loaded.metadata["model_name"]) == (32, 12, "magnet_tiny")
    assert len(loaded.vocabulary) == 64 and loaded.metadata["best_metric"] == "oIoU"
    again = checkpoints.load(tmp_path / "run" / "checkpoint.safetensors").model
    assert again.spec == model.spec and same_weights(again.state_dict(), model.state_dict())
    assert same_weights(model.state_dict(), weights(tmp_path / "run"))
    json.dumps(scores)  # plain numbers
    assert scores["resolution"] == "input"


@pytest.mark.parametrize("name", ["best.safetensors", "checkpoint.safetensors"])
def test_a_run_starts_from_the_weights_of_another(config_file, tmp_path, name: str) -> None:
    """The size that the weights were trained at stays, unless the recipe says one."""
    train(load_config(config_file, ["max_steps=2", "validate_every=2 steps", "ema=0.5"]), tmp_path)
    expected = checkpoints.load(tmp_path / "best.safetensors").model.state_dict()
    start = f"model.weights={tmp_path / name}"
    kept = build_model(load_config(config_file, [start, "data.image_size=null"]))
    assert same_weights(kept.state_dict(), expected) and (kept.spec.size, kept.spec.max_tokens) == (32, 12)
    larger = build_model(load_config(config_file, [start, "data.image_size=64"]))
    assert same_weights(larger.state_dict(), expected) and larger.spec.size == 64
    with pytest.raises(ValueError, match=r"is another magnet_tiny: image\.window_size: file 8, here 4"):
        build_model(load_config(config_file, [start, "model.overrides.image__window_size=4"]))


def test_a_folder_with_a_run_is_not_touched(config_file, tmp_path) -> None:
    config = load_config(config_file, ["max_steps=2"])
    train(config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="already holds a run.*--resume"):
        train(config, tmp_path)
    with pytest.raises(ValueError, match="choose one"):
        train(config, tmp_path, resume=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train(load_config(config_file, ["max_steps=1"]), tmp_path, overwrite=True)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.overrides.image__window_size=4",
            r"of another model .*window_size: None there, 4 here.; give the .*config\.yaml .*or start .*another --out$",
        ),
        ("model.name=lavt_tiny", "of another model"),
        ("seed=1", "cannot go on exactly with another configuration .seed: 0 there, 1 here"),
        (
            "max_steps=9",
            r"max_steps: 2 there, 9 here.; give .*config\.yaml .*--set model\.weights=.*safetensors. Free to .*device",
        ),
    ],
)
def test_resuming_another_run_is_refused(config_file, tmp_path, change: str, message: str) -> None:
    train(load_config(config_file, ["max_steps=2"]), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        train(load_config(config_file, ["max_steps=2", change]), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resuming_a_state_that_lacks_something_is_refused(config_file, tmp_path) -> None:
    config = load_config(config_file, ["max_steps=1"])
    train(config, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    state = load_checkpoint(path)
    for key in ("config", "steps_per_epoch"):
        save_checkpoint({name: value for name, value in state.items() if name != key}, path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=rf"{path}: not a readable checkpoint: .*it lacks {key}"):
            train(config, tmp_path, resume=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["data.root=null"], ValueError, "data.root: no data folder given"),
        (["data.root=/nowhere"], FileNotFoundError, "/nowhere"),
        (["data.train_split=training"], ValueError, "data.train_split: .* has no split 'training'; it has train"),
        (["model.name=magnet_huge"], ValueError, "magnet_huge"),
        (["model.overrides.windows=3"], ValueError, "windows"),
        (["model.overrides.text__vocab_size=100"], ValueError, "vocabulary has .* entries, but .* embeds 100"),
        (["device=abacus"], ValueError, "device: expected 'auto'"),
        (["batch_size=1000"], ValueError, "batch_size=1000 exceeds"),
        (["optimiser.freeze=[bert.*]"], ValueError, "optimiser.freeze"),
    ],
)
def test_bad_runs_leave_no_folder(config_file, tmp_path, changes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        train(load_config(config_file, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_what_the_model_reads_are_refused_before_training(config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ReferringModel, "needs", ("proposals",))  # superpixels are made of the picture
    with pytest.raises(ValueError, match="the model needs proposals beside image and text"):
        train(load_config(config_file, ["max_steps=1"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lavt_trains_too(config_file, tmp_path) -> None:
    """Two-logit masks, no class, no auxiliary predictions."""
    changes = ["model.name=lavt_tiny", "model.overrides={text__vocab_size: 1280}", "max_steps=4"]
    train(load_config(config_file, changes), tmp_path)
    losses = [row["loss"] for row in MetricsFile(tmp_path / "metrics.jsonl").rows()]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_dry_run_tells_and_leaves_nothing(config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["--set", "validate_every=100 steps", "--set", "max_steps=1000", "--set", "log_every=1"]
    command = ["train", "--config", str(config_file), *changes, "--dry-run"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    assert "losses of 8 steps" in result.output and "images/s" in result.output and "GiB" in result.output
    assert "(1000 steps) takes about" in result.output and "; 10 of them" in result.output
    without = CliRunner().invoke(cli.app, command[:-1])
    assert without.exit_code == 2 and "--out" in without.output
    report = dry_run(load_config(config_file, ["max_steps=3"]))  # fewer steps than it takes
    assert report.memory > 50 << 20 and report.device_memory is None and report.validations == 0
    assert report.remaining == pytest.approx(3 * report.seconds)
