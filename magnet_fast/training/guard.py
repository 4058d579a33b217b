"""Catches the first step whose loss or gradient is NaN or infinite, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteGuard:
    """Remembers on the device which step was the first to go wrong, and with which values.

    `watch` adds a handful of tiny operations to a step and waits for nothing; `first` waits. No batch is held back:
    which sentences a step saw follows from its number.

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
        """values (N,) float32 on the device: what step number `step` gave, in the order of the names."""
        bad = (~torch.isfinite(values) & self._watched).any()
        fresh = bad & (self._step < 0)
        self._step = torch.where(fresh, step, self._step)
        self._values = torch.where(fresh, values, self._values)

    def first(self) -> tuple[int, dict[str, float]] | None:
        """The first bad step of this process and its values; None while all is well. Waits for the device."""
        step = int(self._step)
        return None if step < 0 else (step, dict(zip(self.names, self._values.tolist(), strict=True)))
