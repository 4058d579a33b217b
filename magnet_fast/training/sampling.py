"""Which sentences each step sees: a function of (seed, epoch) alone, so a run can be entered anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class EpochBatches:
    """The micro-batches of one epoch for one process, from some step of the epoch on.

    All processes draw the same permutation of the dataset. Each optimiser step takes the next `batch_size`
    sentences of it and deals them out in equal, contiguous shares: first by micro-batch, then by process.
    What an optimiser step sees therefore depends neither on the number of processes nor on the accumulation.
    The remainder that fills no step is dropped; each epoch drops others.

    Args:
        length: sentences in the dataset.
        batch_size: sentences per optimiser step over all processes and micro-batches.
        accumulation: micro-batches per optimiser step.
        rank, world_size: this process among all.
        seed, epoch: what the order is a function of.
        first_step: optimiser steps of this epoch to skip.
        together: so many items in a row stay together, in their order: sentences about one image.

    Raises:
        ValueError: `batch_size` is not a multiple of `accumulation * world_size * together`, or exceeds `length`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        first_step: int = 0,
        together: int = 1,
    ) -> None:
        if batch_size % (accumulation * world_size):
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of accumulation ({accumulation}) x processes ({world_size})"
            )
        share = batch_size // (accumulation * world_size)
        if share % together:
            raise ValueError(
                f"batch_size={batch_size} gives each process and micro-batch {share} sentences, no multiple of the "
                f"{together} about one image"
            )
        if batch_size > length:
            raise ValueError(f"batch_size={batch_size} exceeds the {length} items of the training split")
        self.length, self.batch_size, self.accumulation = length, batch_size, accumulation
        self.rank, self.world_size = rank, world_size
        self.seed, self.epoch, self.first_step, self.together = seed, epoch, first_step, together

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = torch.randperm(self.length // self.together, generator=generator, device="cpu")
        order = (groups[:, None] * self.together + torch.arange(self.together, device="cpu")).flatten().tolist()
        share = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.first_step, self.steps):
            for micro in range(self.accumulation):
                start = step * self.batch_size + (micro * self.world_size + self.rank) * share
                yield order[start : start + share]
