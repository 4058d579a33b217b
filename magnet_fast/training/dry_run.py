"""A few steps of a run without leaving anything behind: does it fit, how fast is it, when would it be done?"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from magnet_fast.training.building import build_trainer
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.determinism import deterministic_algorithms
from magnet_fast.training.distributed import distributed_world, gather_objects
from magnet_fast.training.progress import duration
from magnet_fast.training.trainer import Trainer

_WARMUP = 2  # allocators, autotuning, loader processes
_STEPS = 6


class DryRun(NamedTuple):
    """What a dry run found, over all processes.

    Attributes:
        losses: of the steps.
        seconds: a step, the mean after two steps of warm-up.
        images_per_second: sentences trained on.
        memory: most bytes of one process: allocated on its GPU, or resident where it computes on the CPU.
        device_memory: bytes that the GPU has in all; None on the CPU.
        validation_seconds: one validation, by its first batch; 0 for none.
        steps: of the whole run; None where the clock ends it.
        validations: in the whole run.
        remaining: seconds that the whole run takes.
    """

    losses: list[float]
    seconds: float
    images_per_second: float
    memory: int
    device_memory: int | None
    validation_seconds: float
    steps: int | None
    validations: int
    remaining: float

    def text(self) -> str:
        """For people."""
        memory = f"{self.memory / 2**30:.2f} GiB"
        if self.device_memory is not None:
            memory += f" of {self.device_memory / 2**30:.1f} GiB"
        length = f"{self.steps} steps" if self.steps else "until the clock says so"
        return "\n".join(
            [
                f"losses of {len(self.losses)} steps: {', '.join(f'{loss:.3f}' for loss in self.losses)}",
                f"a step takes {1e3 * self.seconds:.0f} ms: {self.images_per_second:.1f} images/s",
                f"most memory of one process: {memory}",
                f"a validation takes about {duration(self.validation_seconds)}; {self.validations} of them",
                f"the whole run ({length}) takes about {duration(self.remaining)}",
            ]
        )


def dry_run(config: TrainConfig) -> DryRun:
    """Build everything that `train` would build, take eight steps and one batch of validation, and report.

    Nothing is written. Raises what `train` would raise for a configuration that does not fit.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        distributed_world(config.device) as world,
        deterministic_algorithms(config.deterministic),
    ):
        config = config.model_copy(update={"tensorboard": False})
        trainer = build_trainer(config, Path(folder), world)
        device = world.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        losses, seconds = _steps(trainer)
        before = time.monotonic()
        validation = 0.0
        if trainer.validation_set is not None:
            scored = trainer.rehearse_validation()
            _wait(device)
            sentences = min(config.data.val_limit or len(trainer.validation_set), len(trainer.validation_set))
            validation = (time.monotonic() - before) * sentences / scored
        interval = config.interval(trainer.steps_per_epoch)
        steps = trainer.total_steps
        validations = -(-steps // interval) if steps and interval else 0
        rank_memory = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        return DryRun(
            losses,
            seconds,
            config.batch_size / seconds,
            max(gather_objects(rank_memory, world)),
            torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
            validation,
            steps,
            validations,
            steps * seconds + validations * validation if steps else 60.0 * (config.max_minutes or 0),
        )


def _steps(trainer: Trainer) -> tuple[list[float], float]:
    """Losses of all steps, and the mean time of those after the warm-up, to the slowest process."""
    count = _WARMUP + _STEPS
    losses: list[torch.Tensor] = []
    epoch = 0
    batches = iter(trainer.loader(epoch, 0))
    started = time.monotonic()
    for step in range(count):
        if step == _WARMUP:
            _wait(trainer.world.device)
            started = time.monotonic()
        if step and step % trainer.steps_per_epoch == 0:
            epoch += 1
            batches = iter(trainer.loader(epoch, 0))
        losses.append(trainer.train_step(batches))
    _wait(trainer.world.device)
    seconds = max(gather_objects((time.monotonic() - started) / _STEPS, trainer.world))
    return torch.stack(losses).tolist(), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
