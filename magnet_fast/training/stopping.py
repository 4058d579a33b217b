"""SIGTERM: finish the step, write a checkpoint, leave with an exit status of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from magnet_fast.training.distributed import World

EXIT_STATUS = 75
"""Of a run that was asked to stop and can go on with --resume (EX_TEMPFAIL of sysexits.h: try again later)."""


class TrainingStopped(Exception):
    """The run was asked to stop. Its checkpoint is written; --resume goes on."""


class StopRequest:
    """Whether SIGTERM came, to this process or to any other of the run. Catches the signal inside `with`.

    Signals reach processes at different moments, and all must stop after the same step. So each step sends this
    process's flag around and looks at what the step before brought back: nobody waits, and all learn of a signal
    in the same step, the one after it or the next.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = False
        self._travelling: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        if self._travelling is not None and kind is None:
            self._travelling[1].wait()

    def agreed(self) -> bool:
        """Whether to stop; the same answer on all processes, which all call it once a step."""
        if self._world.size == 1:
            return self._asked
        before = self._travelling
        flag = torch.tensor([self._asked], dtype=torch.int32, device="cpu")  # Gloo carries it beside NCCL's traffic
        self._travelling = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """SIGTERM where no step is under way, and nothing is lost by leaving: TrainingStopped, there and then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    raise TrainingStopped("stopped by SIGTERM outside the steps of training; the same command with --resume goes on")
