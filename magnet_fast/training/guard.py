"""Catches the first step whose loss or gradient is NaN or infinite, and keeps the batch that caused it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import default_collate

from magnet_fast.training.checkpoint import write_atomically

FOLDER = "nonfinite"


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the gradient is NaN or infinite."""


class NonFiniteGuard:
    """Remembers on the device which step was the first to go wrong, and with which values.

    `watch` adds a handful of tiny operations to a step and waits for nothing; `first` waits. No batch is held
    back: which sentences a step saw follows from its number.

    Args:
        names: of the values that `watch` is given.
        watched: those of the names that must be finite.
        device: where the values are.
    """

    def __init__(self, names: Sequence[str], watched: Sequence[str], device: torch.device) -> None:
        self.names, self.watched = tuple(names), tuple(watched)
        self._watched = torch.tensor([name in watched for name in names], device=device)
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._values = torch.zeros(len(self.names), device=device)

    def watch(self, step: int, values: Tensor) -> None:
        """values (N,) float32 on the device: what step number ``step`` gave, in the order of the names."""
        bad = (~torch.isfinite(values) & self._watched).any()
        fresh = bad & (self._step < 0)
        self._step = torch.where(fresh, step, self._step)
        self._values = torch.where(fresh, values, self._values)

    def first(self) -> tuple[int, dict[str, float]] | None:
        """The first bad step of this process and its values; None while all is well. Waits for the device."""
        step = int(self._step)
        return None if step < 0 else (step, dict(zip(self.names, self._values.tolist(), strict=True)))


def save_batch(
    dataset: Any, indices: Sequence[int], folder: Path, step: int, rank: int, facts: dict[str, Any]
) -> tuple[Path, Path]:
    """Write this process's share of a step's batch, read from the dataset again, and what is known of it.

    Args:
        dataset: items as for the trainer; its ``record(index)``, where it has one, describes an item.
        indices: the items, in the order of the micro-batches.
        folder: made if absent.
        facts: plain values for the JSON file.

    Returns:
        ``step-<step>-rank-<rank>.safetensors`` with the stacked items, and the same name in ``.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"step-{step}-rank-{rank}"
    tensors, described = name.with_suffix(".safetensors"), name.with_suffix(".json")
    batch = {key: value.contiguous() for key, value in default_collate([dataset[i] for i in indices]).items()}
    write_atomically(tensors, lambda file: file.write(save(batch)))
    records = [dataset.record(index) for index in indices] if hasattr(dataset, "record") else []
    content = {"step": step, "rank": rank, **facts, "indices": list(indices), "records": records}
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomically(described, lambda file: file.write(text.encode()))
    return tensors, described
