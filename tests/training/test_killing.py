"""Killed at any moment, a run ends with the weights of an unbroken one; elastic restarts go on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from magnet_fast.data.scenes import write_scenes
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.progress import MetricsFile

from .fakes import SMALLEST_MAGNET, same_weights
from .processes import REPOSITORY, environment, run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """40 steps of a small MagNet: all losses, dropout, averaged weights, sentences drawn anew each epoch."""
    folder = tmp_path_factory.mktemp("killing")
    scenes = write_scenes(folder / "scenes", 20, 3, level="easy", image_size=64)
    values = {
        "model": {"name": "magnet_tiny", "overrides": {**SMALLEST_MAGNET, "text__dropout": 0.1}},
        "data": {"root": str(scenes), "image_size": 32, "max_tokens": 12, "cache": True, "mode": "refs"},
        "terms": {"alignment": {"weight": 0.5}, "grounding": {"layers": 1, "heads": 4, "feedforward": 32}},
        "optimiser": {"lr": 1e-3},
        "max_steps": 40,
        "batch_size": 2,
        "checkpoint_every": 3,
        "validate_every": "8 steps",
        "log_every": 1,
        "ema": 0.9,
        "deterministic": True,
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_killed_again_and_again_the_run_ends_as_an_unbroken_one(config_file, tmp_path) -> None:
    """By SIGKILL and by SIGTERM: at any moment, in a validation, and while a checkpoint or weights are written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seed = random.randrange(1000)
    done = json.loads(run_module("killing", config_file, tmp_path, seed).splitlines()[-1])
    assert len(done) >= 5
    one, other = (load_checkpoint(folder / CHECKPOINT) for folder in (whole, killed))
    what = f"seed {seed}: {done}"
    for part in ("model", "terms"):
        assert same_weights(one[part], other[part]), what
    assert same_weights(one["ema"]["weights"], other["ema"]["weights"]), what
    for name, entry in one["optimiser"]["state"].items():
        assert same_weights(entry, other["optimiser"]["state"][name]), what
    for name in ("best.safetensors", "last.safetensors"):
        assert same_weights(load_file(whole / name), load_file(killed / name)), what

    def rows(folder: Path) -> list[dict]:
        found = MetricsFile(folder / "metrics.jsonl").rows()
        return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]

    assert rows(killed) == rows(whole), what


@pytest.mark.slow
def test_an_elastic_restart_goes_on_exactly(config_file, tmp_path) -> None:
    """torchrun starts a process again that died; --resume finds the checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = ["max_steps=8"]
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys\n"
        "from magnet_fast.training import Trainer, load_config, train\n"
        "after = Trainer._after_step\n"
        "def die(self):\n"
        "    after(self)\n"
        "    if self.step == 5 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Trainer._after_step = die\n"
        f"config = load_config({str(config_file)!r}, {changes!r})\n"
        f"train(config, {str(broken)!r}, resume=True)\n"
        f"train(config, {str(whole)!r})\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    command = [*torchrun, "--max-restarts", "1", "--monitor-interval", "0.1", str(worker)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 3" in done.stdout
    one, other = (load_checkpoint(folder / CHECKPOINT)["model"] for folder in (whole, broken))
    assert same_weights(one, other)
