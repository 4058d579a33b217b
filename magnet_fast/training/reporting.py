"""What a run says: rows of metrics, TensorBoard's curves, and lines for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_fast.training.distributed import World, gather_objects, mean_over_world
from magnet_fast.training.progress import MetricsFile, RunDisplay, TensorBoard, duration, time_left


class RunLog:
    """Sums the values of steps between the rows, and writes the rows.

    Args:
        out: folder of `metrics.jsonl` and, where asked for, `tensorboard/`.
        names: of the values of a step, the total loss first and the gradient's norm last.
        world: this process among all; the first one writes.
        steps_per_epoch: for the column `epoch`.
        total_steps: of the run; None where the clock ends it.
        batch_size: sentences a step.
        tensorboard: whether to write curves, too.
    """

    def __init__(
        self,
        out: Path,
        names: Sequence[str],
        world: World,
        *,
        steps_per_epoch: int,
        total_steps: int | None,
        batch_size: int,
        tensorboard: bool = False,
    ) -> None:
        self.out, self.names, self.world = out, tuple(names), world
        self.steps_per_epoch, self.total_steps, self.batch_size = steps_per_epoch, total_steps, batch_size
        self.metrics = MetricsFile(out / "metrics.jsonl")
        self._wants_tensorboard, self._tensorboard = tensorboard, None
        self._sums = torch.zeros(len(self.names), device=world.device)  # since the last row
        self.steps = 0
        self._display = RunDisplay("training", enabled=False)
        self._time, self._step = time.monotonic(), 0

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """For the time of a run that goes on from a step."""
        self._time, self._step = time.monotonic(), step
        if self._wants_tensorboard and self.world.is_main:
            self._tensorboard = TensorBoard(self.out / "tensorboard", step)
        with RunDisplay("training", enabled=self.world.is_main) as self._display, self._tensorboard or nullcontext():
            yield

    def say(self, text: str) -> None:
        """A line that stays."""
        self._display.message(text)

    # ---- values of steps ----

    def add(self, values: Tensor) -> None:
        """values (N,) of a step, on the device."""
        self._sums += values
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Since the last row, over the steps and the processes. Collective; waits for the device."""
        values = mean_over_world(self._sums / max(self.steps, 1), self.world).tolist()
        return dict(zip(self.names, values, strict=True))

    def state(self) -> dict[str, Any]:
        """The sums of all processes. Collective."""
        return {"sums": gather_objects(self._sums.cpu().clone(), self.world), "steps": self.steps}

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state`; rows of later steps are forgotten, the run will write them again."""
        sums, self.steps = state["sums"], state["steps"]
        same = len(sums) == self.world.size
        self._sums.copy_(sums[self.world.rank] if same else torch.stack(sums).mean(dim=0))
        if self.world.is_main:
            self.metrics.drop_after(step, unfinished=self.steps > 0)

    # ---- rows ----

    def training(self, step: int, means: dict[str, float], lr: float, share: float, elapsed: float) -> None:
        """A row of training, and the line of progress; the sums begin anew."""
        now = time.monotonic()
        rate = (step - self._step) * self.batch_size / max(now - self._time, 1e-9)
        self._time, self._step = now, step
        self._sums.zero_()
        self.steps = 0
        if not self.world.is_main:
            return
        row = {"kind": "train", **self._place(step), **means, "lr": lr, "images_per_second": round(rate, 2)}
        self._write(row)
        left = time_left(elapsed, share)
        parts = [f"{name} {means[name]:.3f}" for name in self.names[1:-1]]
        words = [
            f"step {step}{f'/{self.total_steps}' if self.total_steps else ''}",
            f"epoch {row['epoch']:.2f}",
            f"loss {means['loss']:.3f} ({', '.join(parts)})",
            f"{rate:.1f} images/s",
            "" if left is None else f"{duration(left)} left",
        ]
        self._display.update(min(share, 1.0), " · ".join(words))

    def validation(self, step: int, scores: dict[str, Any], text: str, seconds: float) -> None:
        """A row of validation; its seconds do not count in images per second, which are those of training."""
        self._time += seconds
        if self.world.is_main:
            self._write({"kind": "validation", **self._place(step), **scores})
            self.say(f"step {step}: validation {text}")

    def _place(self, step: int) -> dict[str, Any]:
        return {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        if self._tensorboard:
            self._tensorboard.append(row)
