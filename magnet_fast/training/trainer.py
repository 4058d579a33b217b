"""The training loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from magnet_fast import models
from magnet_fast.evaluation import evaluate
from magnet_fast.training.averaging import WeightAverage
from magnet_fast.training.checkpoint import CHECKPOINT, rng_state, save_checkpoint, seed_everything, set_rng_state
from magnet_fast.training.config import TrainConfig
from magnet_fast.training.distributed import (
    World,
    broadcast_object,
    gather_objects,
    mean_over_world,
    pick_device,
)
from magnet_fast.training.guard import FOLDER, NonFiniteGuard, TrainingError, save_batch
from magnet_fast.training.hidden_words import hidden_word_accuracy
from magnet_fast.training.objective import AUTOCAST_DTYPE, Grounding, Objective
from magnet_fast.training.optim import build_optimiser, freeze_parameters
from magnet_fast.training.parallel import (
    gradients_stay,
    load_whole,
    load_whole_optimiser,
    parallelise,
    synchronise_batch_norm,
    whole,
    whole_scalar,
)
from magnet_fast.training.progress import MetricsFile, RunDisplay, TensorBoard, duration
from magnet_fast.training.recomputation import recompute_activations
from magnet_fast.training.sampling import EpochBatches
from magnet_fast.training.schedule import poly_factor, set_learning_rate
from magnet_fast.training.stopping import StopRequest, TrainingStopped, leave_to_the_main_process


class Trainer:
    """Trains a model on a dataset, validates it, writes checkpoints and metrics.

    Args:
        config: the run.
        model: a model of this package, on any device; it is moved to the world's.
        training_set: items are dicts of ``image``, ``mask``, ``input_ids``, ``attention_mask``.
        validation_set: an ``ExpressionDataset`` by sentences, or None to train without validation.
        out: an existing folder for ``checkpoint.safetensors``, ``best.safetensors``, ``last.safetensors``,
            ``metrics.jsonl``.
        world: this process among all; default: one process on ``config.device``.
        metadata: strings kept with the weights.
        grounding: Mask Grounding, trained with the model and kept in the checkpoint, never in the exported weights.

    `run` trains to the end. `load_state` before it goes on with a checkpoint: on the CPU, with the same
    number of threads, the resumed run equals an uninterrupted one bit for bit, because the order of the data
    is a function of (seed, epoch) and the checkpoint holds everything else a step depends on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        training_set: Any,
        validation_set: Any | None,
        out: str | Path,
        world: World | None = None,
        metadata: dict[str, str] | None = None,
        grounding: Grounding | None = None,
    ) -> None:
        self.config, self.out, self.metadata = config, Path(out), metadata or {}
        self.world = world or World(0, 1, pick_device(config.device))
        self.training_set, self.validation_set = training_set, validation_set
        self.steps_per_epoch = self._batches(epoch=0).steps
        self.total_steps = config.max_steps or (config.epochs or 0) * self.steps_per_epoch or None
        self.model, self.grounding = model, grounding
        self._build()
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=config.precision == "fp16")
        self.metrics_file = MetricsFile(self.out / "metrics.jsonl")
        self.tensorboard: TensorBoard | None = None
        self.step = 0
        self.best: float | None = None
        self.scores: dict[str, Any] = {}
        self._validated_at = -1
        self._saved_at = -1
        self._trained_seconds = 0.0  # of the processes before this one
        self._started = time.monotonic()
        # Losses, the total first, and the gradient's norm: summed between the rows of the log.
        self._logged = ("loss", *self.objective.logged, "grad_norm")
        self._window = torch.zeros(len(self._logged), device=self.world.device)  # sums since the last row
        self._window_steps = 0
        # Loss scaling meets infinite gradients now and then, and skips those steps.
        watched = self._logged[:-1] if self.scaler.is_enabled() else self._logged
        self.guard = NonFiniteGuard(self._logged, watched, self.world.device)
        # Each process draws its own dropout.
        seed_everything(config.seed + 1 + self.world.rank)

    def _build(self) -> None:
        """Objective, its form for several processes, optimiser, average: in the one order in which they fit."""
        config, world = self.config, self.world
        freeze_parameters(self.model, config.optimiser.freeze)
        objective = Objective(self.model, config.loss, config.precision, self.grounding).to(world.device)
        self.objective = synchronise_batch_norm(objective, world)
        # Sharded, a model cannot be validated (processes have unlike numbers of batches) or exported: a copy is.
        sharded = config.parallel == "fsdp" and world.size > 1
        self._replica = copy.deepcopy(self.objective).cpu() if sharded else None
        if config.activation_checkpointing:
            recompute_activations(self.objective)
        self._step_module = parallelise(self.objective, world, config.parallel)
        if config.compile:
            self._step_module.compile()
        self.optimiser = build_optimiser(self.model, config.optimiser, self.grounding)
        self.average = WeightAverage(self.objective, config.ema) if config.ema else None

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last validation's scores.

        Raises:
            TrainingError: a loss or the gradient became NaN or infinite.
            TrainingStopped: SIGTERM came; the step was finished and a checkpoint written.
        """
        self._started = time.monotonic()
        self._log_time, self._log_step = self._started, self.step
        if self.config.tensorboard and self.world.is_main:
            self.tensorboard = TensorBoard(self.out / "tensorboard", self.step)
        display = RunDisplay("training", enabled=self.world.is_main)
        with display as self.display, StopRequest(self.world) as self._stop, self.tensorboard or nullcontext():
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
        """Everything a run depends on, as tensors and plain containers. Collective; whole on the first process."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        main = self.world.is_main
        average = self.average
        return {
            "config": self.config.model_dump(mode="json"),
            "model_config": self.model.config.model_dump(mode="json"),
            "metadata": dict(self.metadata),
            "model": whole(self.model.state_dict(), main),
            "grounding": whole(self.grounding.state_dict(), main) if self.grounding else {},
            "ema": {"weights": whole(average.weights, main), "updates": average.updates} if average else {},
            "optimiser": whole(self.optimiser.state_dict(), main),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": epoch,
            "position": position,
            "steps_per_epoch": self.steps_per_epoch,
            "trained_seconds": self._elapsed(),
            "best": self.best,
            "scores": self.scores,
            "validated_at": self._validated_at,
            "window": {"sums": self._gathered_window(), "steps": self._window_steps},
            "rng": gather_objects(rng_state(), self.world),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; ValueError where it is of another model or amount of data."""
        if state["model_config"] != self.model.config.model_dump(mode="json"):
            raise ValueError(
                f"checkpoint: it is of another model (its configuration is {state['model_config']}, "
                f"this model's is {self.model.config.model_dump(mode='json')})"
            )
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"checkpoint: its run had {state['steps_per_epoch']} steps an epoch, this one has "
                f"{self.steps_per_epoch}: the training data are not the same"
            )
        load_whole(self.model.state_dict(), state["model"])
        if self.grounding:
            load_whole(self.grounding.state_dict(), state["grounding"])
        if self.average:
            load_whole(self.average.weights, state["ema"]["weights"])
            self.average.updates = state["ema"]["updates"]
        load_whole_optimiser(self.optimiser, state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = self._saved_at = state["step"]
        self._trained_seconds = state["trained_seconds"]
        self.best, self.scores, self._validated_at = state["best"], state["scores"], state["validated_at"]
        self._window_steps = state["window"]["steps"]
        windows, generators = state["window"]["sums"], state["rng"]
        if len(generators) == self.world.size:
            self._window.copy_(windows[self.world.rank])
            set_rng_state(generators[self.world.rank])
        else:  # another number of processes: the data go on exactly, dropout draws anew
            self._window.copy_(torch.stack(windows).mean(dim=0))
            seed_everything(self.config.seed + 1 + self.world.rank + self.step)
        if self.world.is_main:
            self.metrics_file.drop_after(self.step)

    # ---- one step ----

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> Tensor:
        """One optimiser step on the next micro-batches; its loss, on the device. Waits for nothing on a GPU."""
        config = self.config
        self.objective.train()
        factor = poly_factor(self._progress(), self.step, power=config.schedule.power, warmup=config.schedule.warmup)
        set_learning_rate(self.optimiser, factor)
        self.optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(len(self._logged) - 1, device=self.world.device)
        for micro in range(config.accumulation):
            batch = {key: value.to(self.world.device, non_blocking=True) for key, value in next(batches).items()}
            # Gradients travel between the processes once a step, with the last micro-batch.
            with gradients_stay(self._step_module, micro < config.accumulation - 1):
                losses = self._step_module(batch["image"], batch["input_ids"], batch["attention_mask"], batch["mask"])
                self.scaler.scale(losses["total"] / config.accumulation).backward()
            parts = [losses[key].detach() for key in ("total", *self._logged[1:-1])]
            sums += torch.stack(parts) / config.accumulation
        self.scaler.unscale_(self.optimiser)
        values = torch.cat([sums, self._clip()[None]])
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update()
        self.step += 1
        self.guard.watch(self.step, values)
        self._window += values
        self._window_steps += 1
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
            self._log()
        interval = self.config.interval(self.steps_per_epoch)
        if interval is not None and self.step % interval == 0:
            self._validate()
            self._save()
        elif self.step % self.config.checkpoint_every == 0:
            self._save()
        if self._stop.agreed() and not self._done():
            if self._saved_at != self.step:
                self._save()
            raise TrainingStopped(
                f"stopped by SIGTERM after step {self.step}; {self.out / CHECKPOINT} holds it, --resume goes on"
            )

    def _finish(self) -> None:
        if self._window_steps:
            self._log()
        if self.config.validate_every != "never" and self._validated_at != self.step:
            self._validate()
        if self._saved_at != self.step:
            self._save()
        with self._exported() as exported:
            if self.world.is_main:
                models.save_model(exported.model, self.out / "last.safetensors", self._extra())
        if self.world.is_main:
            self.display.message(f"done: {self.step} steps in {duration(self._elapsed())}; everything is in {self.out}")

    def _log(self) -> None:
        means = self._checked_window()
        now = time.monotonic()
        rate = (self.step - self._log_step) * self.config.batch_size / max(now - self._log_time, 1e-9)
        self._log_time, self._log_step = now, self.step
        self._window.zero_()
        self._window_steps = 0
        share = self._progress()
        if not self.world.is_main:
            return
        row = {
            "kind": "train",
            **self._place(),
            **means,
            "lr": max(group["lr"] for group in self.optimiser.param_groups),
            "images_per_second": round(rate, 2),
        }
        self._report(row)
        left = self._elapsed() * (1 - share) / share if share > 0 else math.nan
        state = " · ".join(
            [
                f"step {self.step}{f'/{self.total_steps}' if self.total_steps else ''}",
                f"epoch {row['epoch']:.2f}",
                f"loss {means['loss']:.3f} (bce {means['bce']:.3f}, dice {means['dice']:.3f})",
                f"{rate:.1f} images/s",
                f"{duration(left)} left" if math.isfinite(left) else "",
            ]
        )
        self.display.update(share, state)

    def _checked_window(self) -> dict[str, float]:
        """Means since the last row over the steps and the processes. Waits for the device."""
        values = mean_over_world(self._window / max(self._window_steps, 1), self.world).tolist()
        means = dict(zip(self._logged, values, strict=True))
        # What is not finite in one process is not finite in the mean: all of them come to the same answer.
        self._stop_if_bad(not all(math.isfinite(means[name]) for name in self.guard.watched))
        return means

    def _stop_if_bad(self, bad: bool) -> None:
        """Save each process's share of the first bad step, and raise TrainingError. Collective where ``bad``."""
        if not bad:
            return
        found = gather_objects(self.guard.first(), self.world)
        step = min(entry[0] for entry in found if entry is not None)
        names = {
            name
            for entry in found
            if entry and entry[0] == step
            for name in self.guard.watched
            if not math.isfinite(entry[1][name])
        }
        mine = found[self.world.rank]
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        batches = iter(self._batches(epoch, position))
        indices = [index for _ in range(self.config.accumulation) for index in next(batches)]
        if self.config.data.mode == "refs":
            self.training_set.set_epoch(epoch)
        facts = {
            "epoch": epoch,
            "position": position,
            "found_after_step": self.step,
            "processes": self.world.size,
            "values": {key: str(value) for key, value in mine[1].items()} if mine and mine[0] == step else {},
            "precision": self.config.precision,
        }
        saved, _ = save_batch(self.training_set, indices, self.out / FOLDER, step, self.world.rank, facts)
        gather_objects(None, self.world)  # all have saved theirs before the first one ends the run
        before = f"{CHECKPOINT} is of step {self._saved_at}" if self._saved_at > 0 else "there is no checkpoint yet"
        raise TrainingError(
            f"{' and '.join(name for name in self._logged if name in names)} became NaN or infinite in step {step}, "
            f"found after step {self.step}; its batch is in {saved} and the .json beside it; {before}. Lower "
            "optimiser.lr, set clip_norm, lengthen schedule.warmup, or train in float32 or bf16"
        )

    def _validate(self) -> None:
        if self.validation_set is None:
            return
        self._checked_window()
        before = time.monotonic()
        with self._exported() as exported:
            self.scores = self._scored(exported)
            value = self.scores[self.config.best_metric]
            better = self.best is None or value > self.best
            self.best = value if better else self.best
            if better and self.world.is_main:
                models.save_model(exported.model, self.out / "best.safetensors", self._extra())
        self._validated_at = self.step
        self._log_time += time.monotonic() - before  # images per second are those of training
        if not self.world.is_main:
            return
        self._report({"kind": "validation", **self._place(), **self.scores})
        words = self.scores.get("hidden_words")
        self.display.message(
            f"step {self.step}: validation oIoU {self.scores['oIoU']:.2f}, mIoU {self.scores['mIoU']:.2f} "
            f"on {self.scores['sentences']} sentences{' (best so far)' if better else ''}"
            + (f"; hidden words {words['accuracy']:.1f} % right" if words else "")
        )

    def rehearse_validation(self) -> int:
        """Score one batch a process, for nothing but the time it takes; the number of sentences. Collective."""
        count = min(self.config.eval_batch_size * self.world.size, len(self.validation_set))
        with self._exported() as exported:
            evaluate(exported.model, self.validation_set, self.config.eval_batch_size, limit=count)
        return count

    def _scored(self, exported: Objective) -> dict[str, Any]:
        config = self.config
        common = {
            "workers": config.data.workers,
            "autocast": AUTOCAST_DTYPE[config.precision],
        }
        data, size = self.validation_set, config.eval_batch_size
        scores = evaluate(exported.model, data, size, limit=config.data.val_limit, **common)
        if exported.grounding is not None:
            scores["hidden_words"] = hidden_word_accuracy(
                exported.model, exported.grounding, data, size, limit=config.data.val_limit, **common
            )
        return scores

    @contextmanager
    def _exported(self) -> Iterator[Objective]:
        """Model and Mask Grounding as they are validated and exported: averaged, and whole. Collective."""
        if self._replica is None:
            with self.average.in_place() if self.average else nullcontext():
                yield self.objective
            return
        self._replica.load_state_dict(whole(self.average.weights if self.average else self.objective.state_dict()))
        try:
            yield self._replica.to(self.world.device)
        finally:
            self._replica.cpu()

    def _save(self) -> None:
        self._checked_window()
        state = self.state()
        if self.world.is_main:
            save_checkpoint(state, self.out / CHECKPOINT)
        self._saved_at = self.step

    # ---- pieces ----

    def _batches(self, epoch: int, first_step: int = 0) -> EpochBatches:
        config = self.config
        return EpochBatches(
            len(self.training_set),
            config.batch_size,
            config.accumulation,
            self.world.rank,
            self.world.size,
            config.seed,
            epoch,
            first_step,
        )

    def loader(self, epoch: int, first_step: int) -> DataLoader:
        if self.config.data.mode == "refs":
            self.training_set.set_epoch(epoch)
        return DataLoader(
            self.training_set,
            batch_sampler=self._batches(epoch, first_step),
            num_workers=self.config.data.workers,
            pin_memory=self.world.device.type == "cuda",
            # A loader draws a seed when its iteration starts: not from the generator that dropout draws from,
            # or a resumed epoch, being entered twice, would draw differently.
            generator=torch.Generator().manual_seed(epoch),
            worker_init_fn=leave_to_the_main_process,
        )

    def _elapsed(self) -> float:
        return self._trained_seconds + time.monotonic() - self._started

    def _progress(self) -> float:
        """The share of the run that is done; the same on all processes."""
        if self.total_steps is not None:
            return self.step / self.total_steps
        return broadcast_object(self._elapsed(), self.world) / (60 * self.config.max_minutes)

    def _done(self) -> bool:
        return self._progress() >= 1

    def _gathered_window(self) -> list[Tensor]:
        return gather_objects(self._window.cpu().clone(), self.world)

    def _place(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}

    def _report(self, row: dict[str, Any]) -> None:
        self.metrics_file.append(row)
        if self.tensorboard:
            self.tensorboard.append(row)

    def _extra(self) -> dict[str, str]:
        return {**self.metadata, "step": str(self.step), "best_metric": self.config.best_metric}

    def _announce(self) -> None:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        length = f"{self.total_steps} steps" if self.total_steps else f"{self.config.max_minutes:g} minutes"
        processes = f" x {self.world.size} processes" if self.world.size > 1 else ""
        self.display.message(
            f"{self.config.model.name}: {trained / 1e6:.2f} M parameters to train on "
            f"{len(self.training_set)} items, {self.steps_per_epoch} steps an epoch, {length}, "
            f"{self.world.device}{processes}, {self.config.precision}"
            + (f"; resumed at step {self.step}" if self.step else "")
        )
