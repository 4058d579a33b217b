"""What two Gloo processes do in test_two_processes: run as a module with a folder, leaves runs and JSON there."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from magnet_fast import models
from magnet_fast.data.sample import Sample
from magnet_fast.data.tokenizers import Tokenizer
from magnet_fast.evaluation import evaluate
from magnet_fast.models import Text
from magnet_fast.training import Trainer, TrainingError, TrainingStopped
from magnet_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from magnet_fast.training.distributed import World
from magnet_fast.training.run import state_to_resume

from .fakes import SMALLEST_MAGNET, FakeDataset, FakeModel, fake_config, trainer_of
from .processes import in_two_processes

FAKE = {"accumulation": 2, "clip_norm": 0.5, "ema": 0.9, "batch_size": 8, "log_every": 100}
MAGNET = {
    "model": {"name": "magnet_tiny", "overrides": SMALLEST_MAGNET},
    "terms": {"alignment": {"weight": 0.5}, "grounding": {"layers": 1, "heads": 4, "feedforward": 32}},
    "optimiser": {"lr": 1e-3, "eps": 1e-3},
    "epochs": None,
    "max_steps": 2,
    "batch_size": 4,
    "validate_every": "2 steps",
    "checkpoint_every": 100,
    "log_every": 1,
}


class Counted(FakeDataset):
    """Notes which items were asked for; one of them is not a number."""

    def __init__(self, length: int, broken: int | None = None) -> None:
        super().__init__(length)
        self.asked: list[int] = []
        self.broken = broken

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        item = super().__getitem__(index)
        if index == self.broken:
            item["image"][0, 0, 0] = float("nan")
        return item


class ReadableDataset(FakeDataset):
    """With sentences and their tokenizer, for the hidden words."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.tokenizer = Tokenizer(max_tokens=6)

    def __getitem__(self, index: int) -> Sample:
        ids, mask = self.tokenizer(f"the {('red', 'blue', 'green')[index % 3]} circle")
        return {**super().__getitem__(index), "text": Text(ids[0], mask[0])}


def fake_trainer(out: Path, world: World | None, **changes: object) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(11)
    config = fake_config(**{**FAKE, **changes})
    return trainer_of(config, FakeModel(), FakeDataset(24), FakeDataset(7), out, world)


def magnet_trainer(out: Path, world: World | None, **changes: object) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(11)
    config = fake_config(**{**MAGNET, **changes})
    model, data = models.create("magnet_tiny", **SMALLEST_MAGNET), ReadableDataset(16)
    return trainer_of(config, model, data, ReadableDataset(5), out, world, data.tokenizer)


def checks(out: Path, world: World) -> dict[str, object]:
    """All that is done in both processes; what each found."""
    found: dict[str, object] = {}
    for kind in ("ddp", "fsdp"):
        found[kind] = fake_trainer(out / kind, world, parallel=kind).run()
        recompute = {"activation_checkpointing": kind == "fsdp"}
        found[f"magnet_{kind}"] = magnet_trainer(out / f"magnet_{kind}", world, parallel=kind, **recompute).run()
    sharded = fake_trainer(out / "shards", world, parallel="fsdp")
    found["share"] = sum(p.to_local().numel() for p in sharded.model.parameters())

    # Stopped by SIGTERM to the second process alone, then resumed; and resumed with copies instead of shards.
    trainer = fake_trainer(out / "stopped", world, parallel="fsdp")
    after = trainer._after_step

    def receive() -> None:
        if trainer.step == 4 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after()

    trainer._after_step = receive
    try:
        trainer.run()
    except TrainingStopped:
        found["stopped_at"] = trainer.step
    found["received_default"] = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    dist.barrier()
    for name, kind in (("resumed", "fsdp"), ("resumed_as_ddp", "ddp")):
        resumed = fake_trainer(out / name, world, parallel=kind)
        resumed.load_state(load_checkpoint(out / "stopped" / CHECKPOINT))
        resumed.run()

    found |= folders_apart(out, world)

    validation = Counted(7)
    found["scores"] = evaluate(FakeModel().eval(), validation, batch_size=2)
    found["scored"] = validation.asked

    broken = out / "broken"
    broken.mkdir(exist_ok=True)
    torch.manual_seed(11)
    training_set = Counted(24, broken=17)
    trainer = trainer_of(fake_config(**{**FAKE, "ema": None}), FakeModel(), training_set, None, broken, world)
    try:
        trainer.run()
    except TrainingError as error:
        found["error"] = str(error)
    found["batch_norms"] = sum(isinstance(m, nn.SyncBatchNorm) for m in trainer.model.modules())
    return found


def folders_apart(out: Path, world: World) -> dict[str, object]:
    """Each process has a folder of its own, as on machines without a shared disk; the first one's holds a run."""
    own = out / f"own-{world.rank}"
    own.mkdir()
    if world.is_main:
        shutil.copy(out / "stopped" / CHECKPOINT, own)
    config = fake_config(**{**FAKE, "parallel": "fsdp"})
    refused = None
    try:
        state_to_resume(config, own, False, False, world)
    except FileExistsError as error:
        refused = str(error)
    state = state_to_resume(config, own, True, False, world)
    resumed = fake_trainer(own, world, parallel="fsdp")
    resumed.load_state(state)
    started_at = resumed.step
    resumed.run()
    return {"refused": refused, "started_at": started_at, "own_files": sorted(path.name for path in own.iterdir())}


if __name__ == "__main__":
    in_two_processes(checks)
