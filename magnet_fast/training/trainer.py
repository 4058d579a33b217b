"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.data.loader import Loader
from magnet_fast.data.loading import leave_to_the_main_process
from magnet_fast.data.sample import collate, to_device
from magnet_fast.fast import accelerate
from magnet_fast.ops import prove
from magnet_fast.ops._proof_cases import OPERATORS
from magnet_fast.training.averaging import WeightAverage
from magnet_fast.training.checkpoint import CHECKPOINT, save_checkpoint
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.distributed import World, broadcast_object, peers_watched, pick_device
from magnet_fast.training.disturbance import told_with_checkpoint
from magnet_fast.training.exported import Exported
from magnet_fast.training.failure import FOLDER, stop_training
from magnet_fast.training.guard import NonFiniteGuard
from magnet_fast.training.objective import Objective, tensors_of
from magnet_fast.training.optim import build_optimiser, freeze_parameters
from magnet_fast.training.parallel import gradients_stay, parallelise, synchronise_batch_norm, whole_scalar
from magnet_fast.training.progress import duration
from magnet_fast.training.randomness import seed_everything
from magnet_fast.training.recomputation import recompute_activations
from magnet_fast.training.reporting import RunLog
from magnet_fast.training.sampling import EpochBatches
from magnet_fast.training.schedule import rate_factor, set_learning_rate
from magnet_fast.training.state import load_state_into, state_of
from magnet_fast.training.stopping import StopRequest, TrainingStopped
from magnet_fast.training.terms import Term
from magnet_fast.training.validation import summary, validate


class Trainer:
    """Trains a model on a dataset, validates it, writes checkpoints and metrics.

    Args:
        config: the run.
        model: a `ReferringModel`, or whatever has its methods and parts, on any device; it is moved to the world's.
        terms: the losses by name, as `build_terms` makes them; trained with the model, never exported.
        training_set: items are samples; with `set_epoch` where `config.data.mode` is "refs" or
            `config.data.phrases` is given.
        validation_set: a dataset by sentences, or None to train without validation.
        out: an existing folder for `checkpoint.safetensors`, `best.safetensors`, `last.safetensors`, `metrics.jsonl`.
        world: this process among all; default: one process on `config.device`.
        metadata: strings kept with the weights.

    `run` trains to the end. `load_state` before it goes on with a checkpoint: on the CPU, with the same number of
    threads, the resumed run equals an uninterrupted one bit for bit, because the order of the data is a function of
    (seed, epoch) and the checkpoint holds everything else a step depends on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        terms: Mapping[str, Term],
        training_set: Any,
        validation_set: Any | None,
        out: str | Path,
        world: World | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.config, self.out, self.metadata = config, Path(out), metadata or {}
        self.world = world or World(0, 1, pick_device(config.device))
        self.training_set, self.validation_set = training_set, validation_set
        self.steps_per_epoch = self._batches(epoch=0).steps
        self.total_steps = config.max_steps or (config.epochs or 0) * self.steps_per_epoch or None
        self.model = model
        self._build(terms)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=config.precision == "fp16")
        self.step = 0
        self.best: float | None = None
        self.scores: dict[str, Any] = {}
        self.validated_at = self.saved_at = -1
        self.trained_seconds = 0.0  # of the processes before this one
        self._started = time.monotonic()
        names = ("loss", *self.objective.logged, "grad_norm")
        self.log = RunLog(
            self.out,
            names,
            self.world,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            batch_size=config.batch_size,
            tensorboard=config.tensorboard,
        )
        # Loss scaling meets infinite gradients now and then, and skips those steps.
        self.guard = NonFiniteGuard(names, names[:-1] if self.scaler.is_enabled() else names, self.world.device)
        # Each process draws its own dropout.
        seed_everything(config.seed + 1 + self.world.rank)

    def _build(self, terms: Mapping[str, Term]) -> None:
        """Objective, its form for several processes, optimiser, average: in the one order in which they fit."""
        config, world = self.config, self.world
        freeze_parameters(self.model, config.optimiser.freeze)
        objective = Objective(self.model, terms, config.precision, config.sentences_per_image).to(world.device)
        if config.fast:
            report = accelerate(self.model)
            if objective.dtype is not None:  # what autocast makes of the weights
                replaced = {module.operator for module in report.replaced}
                prove(world.device, (objective.dtype,), tuple(name for name in OPERATORS if name in replaced))
        self.objective = synchronise_batch_norm(objective, world)
        self._exported = Exported(self.objective, world, sharded=config.parallel == "fsdp" and world.size > 1)
        if config.activation_checkpointing:
            recompute_activations(self.objective.repeated_layers())
        self._step_module = parallelise(self.objective, world, config.parallel)
        if config.compile:
            self._step_module.compile()
        self.optimiser = build_optimiser(self.model, config.optimiser, self.objective.terms)
        self.average = WeightAverage(self.objective, config.ema) if config.ema else None

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last validation's scores.

        Raises:
            TrainingError: a loss or the gradient became NaN or infinite.
            TrainingStopped: SIGTERM came; the step was finished and a checkpoint written.
            OSError: a file cannot be written or read, or another process has ended; it says what to go on from.
        """
        self._started = time.monotonic()
        with (
            told_with_checkpoint(self.out, lambda: self.saved_at),
            peers_watched(self.world),
            self.log.open(self.step),
            StopRequest(self.world) as self._stop,
        ):
            self._announce()
            while not self._done():
                epoch, first_step = divmod(self.step, self.steps_per_epoch)
                batches = iter(self.loader(epoch, first_step))
                for _ in range(first_step, self.steps_per_epoch):
                    if self._done():
                        break
                    self.train_step(batches)
                    self._after_step()
            self._finish()
        return self.scores

    def state(self) -> dict[str, Any]:
        """Everything the run depends on; see `training.state`. Collective."""
        return state_of(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; ValueError where it is of another model or amount of data."""
        load_state_into(self, state)

    # ---- one step ----

    def train_step(self, batches: Iterator[dict[str, Any]]) -> Tensor:
        """One optimiser step on the next micro-batches; its loss, on the device. Waits for nothing on a GPU."""
        config = self.config
        self.objective.train()
        progress, rates = self._progress(), config.optimiser
        factor = rate_factor(progress, self.step, **config.schedule.model_dump())
        set_learning_rate(self.optimiser, factor, rates.lr if progress < rates.multiply_from else None)
        self.optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(1 + len(self.objective.logged), device=self.world.device)
        for micro in range(config.accumulation):
            batch = to_device(tensors_of(next(batches)), self.world.device)
            batch["progress"] = torch.full((), progress, device=self.world.device)
            # Gradients travel between the processes once a step, with the last micro-batch.
            with gradients_stay(self._step_module, micro < config.accumulation - 1):
                losses = self._step_module(batch)
                self.scaler.scale(losses["total"] / config.accumulation).backward()
            parts = [losses[key].detach() for key in ("total", *self.objective.logged)]
            sums += torch.stack(parts) / config.accumulation
        self.scaler.unscale_(self.optimiser)
        values = torch.cat([sums, self._clip()[None]])
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update()
        self.step += 1
        self.guard.watch(self.step, values)
        self.log.add(values)
        return sums[0]

    def _clip(self) -> Tensor:
        """Clip the gradient where the configuration says so; returns the norm before that, on the device."""
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_scalar(torch.nn.utils.get_total_norm(gradients))
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        return norm

    # ---- between the steps ----

    def _after_step(self) -> None:
        if self.world.size == 1 and self.world.device.type == "cpu":
            self._stop_if_bad(self.guard.first() is not None)  # nothing to wait for
        if self.step % self.config.log_every == 0:
            self._write_row()
        interval = self.config.interval(self.steps_per_epoch)
        if interval is not None and self.step % interval == 0:
            self._validate()
            self._save()
        elif self.step % self.config.checkpoint_every == 0:
            self._save()
        if self._stop.agreed() and not self._done():
            if self.saved_at != self.step:
                self._save()
            raise TrainingStopped(
                f"stopped by SIGTERM after step {self.step}; {self.out / CHECKPOINT} holds it, --resume goes on"
            )

    def _finish(self) -> None:
        if self.log.steps:
            self._write_row()
        if self.config.validate_every != "never" and self.validated_at != self.step:
            self._validate()
        if self.saved_at != self.step:
            self._save()
        with self._exported.lent(self.average) as exported:
            self._export(exported, "last.safetensors")
        self.log.say(f"done: {self.step} steps in {duration(self.elapsed())}; everything is in {self.out}")

    def _write_row(self) -> None:
        means = self._checked_means()
        rate = max(group["lr"] for group in self.optimiser.param_groups)
        self.log.training(self.step, means, rate, self._progress(), self.elapsed())

    def _validate(self) -> None:
        if self.validation_set is None:
            return
        self._checked_means()
        before = time.monotonic()
        with self._exported.lent(self.average) as exported:
            self.scores = validate(exported, self.validation_set, self.config, self.config.data.val_limit)
            value = self.scores[self.config.best]
            # A score that is not defined on these sentences is NaN, which nothing exceeds.
            better = self.best is None or math.isnan(self.best) or value > self.best
            if better:
                self.best = value
                self._export(exported, "best.safetensors")
        self.validated_at = self.step
        text = summary(self.scores, self.config) + (" (best so far)" if better else "")
        self.log.validation(self.step, self.scores, text, time.monotonic() - before)

    def rehearse_validation(self) -> int:
        """One batch a process validated, for nothing but the time it takes; the number of sentences. Collective."""
        count = min(self.config.eval_batch_size * self.world.size, len(self.validation_set))
        with self._exported.lent(self.average) as exported:
            validate(exported, self.validation_set, self.config, count)
        return count

    def _export(self, exported: Objective, name: str) -> None:
        if self.world.is_main:
            extra = {**self.metadata, "step": str(self.step), "best_metric": self.config.best}
            models.save(exported.model, self.out / name, extra, whole=False)

    def _save(self) -> None:
        self._checked_means()
        state = self.state()
        if self.world.is_main:
            save_checkpoint(state, self.out / CHECKPOINT)
        self.saved_at = self.step

    # ---- what is not finite ----

    def _checked_means(self) -> dict[str, float]:
        """Means since the last row, all of them finite. Collective; waits for the device."""
        means = self.log.means()
        # What is not finite in one process is not finite in the mean: all of them come to the same answer.
        self._stop_if_bad(not all(math.isfinite(means[name]) for name in self.guard.watched))
        return means

    def _stop_if_bad(self, bad: bool) -> None:
        if bad:
            stop_training(self.guard, self.world, self.out / FOLDER, self._seen_in_step)

    def _seen_in_step(self, step: int) -> tuple[Any, list[int], dict[str, Any]]:
        """Dataset, indices and facts of this process's share of a step."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        batches = iter(self._batches(epoch, position))
        indices = [index for _ in range(self.config.accumulation) for index in next(batches)]
        self._enter_epoch(epoch)
        return (
            self.training_set,
            indices,
            {
                "epoch": epoch,
                "position": position,
                "found_after_step": self.step,
                "processes": self.world.size,
                "precision": self.config.precision,
                "checkpoint": f"{CHECKPOINT} is of step {self.saved_at}"
                if self.saved_at > 0
                else "there is no checkpoint",
            },
        )

    # ---- data and time ----

    def loader(self, epoch: int, first_step: int) -> Loader:
        """The micro-batches of this process, from a step of an epoch on."""
        self._enter_epoch(epoch)
        return Loader(
            self.training_set,
            batch_sampler=self._batches(epoch, first_step),
            num_workers=self.config.data.workers,
            collate_fn=collate,
            pin_memory=self.world.device.type == "cuda",
            # A loader draws a seed when its iteration starts: not from the generator that dropout draws from,
            # or a resumed epoch, being entered twice, would draw differently.
            generator=torch.Generator().manual_seed(epoch),
            worker_init_fn=leave_to_the_main_process,
        )

    def _enter_epoch(self, epoch: int) -> None:
        if self.config.data.mode == "refs" or self.config.data.phrases is not None:
            self.training_set.set_epoch(epoch)

    def _batches(self, epoch: int, first_step: int = 0) -> EpochBatches:
        config, world = self.config, self.world
        return EpochBatches(
            len(self.training_set),
            config.batch_size,
            config.accumulation,
            world.rank,
            world.size,
            config.seed,
            epoch,
            first_step,
            config.sentences_per_image,
        )

    def elapsed(self) -> float:
        """Seconds of training, those of the processes before this one included."""
        return self.trained_seconds + time.monotonic() - self._started

    def _progress(self) -> float:
        """The share of the run that is done, the same on all processes; by the clock it ends a little above 1."""
        if self.total_steps is not None:
            return self.step / self.total_steps
        return broadcast_object(self.elapsed(), self.world) / (60 * self.config.max_minutes)

    def _done(self) -> bool:
        return self._progress() >= 1

    def _announce(self) -> None:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        length = f"{self.total_steps} steps" if self.total_steps else f"{self.config.max_minutes:g} minutes"
        processes = f" x {self.world.size} processes" if self.world.size > 1 else ""
        self.log.say(
            f"{self.config.model.name}: {trained / 1e6:.2f} M parameters to train on "
            f"{len(self.training_set)} items, {self.steps_per_epoch} steps an epoch, {length}, "
            f"{self.world.device}{processes}, {self.config.precision}; losses: {', '.join(self.objective.terms)}"
            + (f"; resumed at step {self.step}" if self.step else "")
        )
