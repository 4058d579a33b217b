"""The objective as it is validated and exported: averaged where the run averages, whole where it is sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from magnet_fast.training.averaging import WeightAverage
from magnet_fast.training.distributed import World
from magnet_fast.training.objective import Objective
from magnet_fast.training.parallel import whole_on_cpu


class Exported:
    """Lends the objective with the weights to validate.

    Args:
        objective: accelerated, before recomputation, sharding and compilation.
        world: this process among all.
        sharded: whether it will be: a sharded model cannot be validated (processes have unlike numbers of batches) or
            saved, so a whole copy is kept on the CPU.
    """

    def __init__(self, objective: Objective, world: World, sharded: bool) -> None:
        self._objective, self._world = objective, world
        self._replica = copy.deepcopy(objective).cpu() if sharded else None

    @contextmanager
    def lent(self, average: WeightAverage | None) -> Iterator[Objective]:
        """The objective for the time of the block. Collective."""
        if self._replica is None:
            with average.in_place() if average else nullcontext():
                yield self._objective
            return
        weights = average.weights if average else self._objective.state_dict()
        self._replica.load_state_dict({name: whole_on_cpu(value) for name, value in weights.items()})
        try:
            yield self._replica.to(self._world.device)
        finally:
            self._replica.cpu()
