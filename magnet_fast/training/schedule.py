"""The learning rate over a run: linear warm-up, then the polynomial decay of this family of models, or steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rate_factor(
    progress: float, step: int, *, power: float = 0.9, warmup: int = 0, milestones: Sequence[float] = ()
) -> float:
    """What the base learning rate is multiplied by.

    Args:
        progress: the share of the run that is done, 0 at the first step, 1 after the last.
        step: number of optimiser steps done.
        power: exponent of the decay, (1 - progress) ** power.
        warmup: over this many steps the factor also rises linearly from 1/(warmup + 1) to 1.
        milestones: shares of the run from which on the factor is a tenth of what it was.
    """
    decay = (1.0 - min(max(progress, 0.0), 1.0)) ** power
    # A share such as 35/50 is not what so many steps of so many give to the last bit.
    decay *= 0.1 ** sum(progress >= milestone - 1e-9 for milestone in milestones)
    return decay * min(1.0, (step + 1) / (warmup + 1))


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float, alike: float | None = None) -> None:
    """Set each group's `lr` to `factor` times its `initial_lr`, or times `alike`, one rate for all of them."""
    for group in optimiser.param_groups:
        group["lr"] = (group["initial_lr"] if alike is None else alike) * factor
