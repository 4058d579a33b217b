"""torch.distributed as far as training needs it: the environment torchrun gives, and a few collectives.

Everything works without torchrun too, as a world of one process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_LAUNCHED = ("RANK", "WORLD_SIZE")
_PEER_GONE = re.compile(r"closed by peer|reset by peer|Broken pipe|timed out waiting", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0


@contextmanager
def distributed_world(device: str = "auto") -> Iterator[World]:
    """Join torchrun's process group, if there is one, and leave it at the end.

    Args:
        device: "auto" takes a GPU where there is one (the one of LOCAL_RANK under torchrun), else the CPU.

    Raises:
        ValueError: the environment is set in part, or a device is not to be had.
        ConnectionError: another process of the group has ended.

    A process group that exists already is used and left alone. Tensors on a GPU travel by NCCL, those on the
    CPU (RNG states, per-sentence results) by Gloo.
    """
    launched, local_rank = _launched()
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    owned = launched and not dist.is_initialized()
    if owned:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, **_own_part_of_the_store())
    try:
        joined = dist.is_initialized()
        world = World(dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, chosen)
        with peers_watched(world):
            yield world
    finally:
        if owned:
            dist.destroy_process_group()


def _own_part_of_the_store() -> dict[str, Any]:
    """The store in which torchrun's processes find each other, without what those before a restart left in it.

    torchrun keeps one store for all restarts (seen up to torch 2.14): a process that looks for another one's address
    may find that of the dead one, which refuses the connection, or is somebody else by now. Machines of a run
    count their restarts each for itself: this is for one machine alone; docs/training.md says what several need.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restart is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"magnet_fast/restart_{restart}", store), "rank": rank, "world_size": size}


@contextmanager
def peers_watched(world: World) -> Iterator[None]:
    """ConnectionError where another process of the run has ended: the libraries below say it each in its own words."""
    try:
        yield
    except RuntimeError as error:
        names = isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or _PEER_GONE.search(str(error))
        if world.size == 1 or not names:
            raise
        first = next(iter(str(error).splitlines()), "")
        raise ConnectionError(
            f"another process of the run has ended, or cannot be reached; its own output says why ({first[:200]})"
        ) from error


def take_local_rank(local_rank: int | None) -> None:
    """The `--local-rank` that `python -m torch.distributed.launch` adds, as torchrun's LOCAL_RANK where that is unset.

    Raises:
        ValueError: it says that there are other processes, and nothing says how many.
    """
    if local_rank is None:
        return
    if all(name in os.environ for name in _LAUNCHED):
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    elif local_rank != 0:
        raise ValueError(
            f"--local-rank: {local_rank} was given, but {' and '.join(_LAUNCHED)} are not set in the environment; "
            "start the processes with torchrun"
        )


def _launched() -> tuple[bool, int]:
    """Whether a launcher started this process as one of several, and its number on this machine."""
    given = [name for name in (*_LAUNCHED, "LOCAL_RANK") if name in os.environ]
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if given and missing:
        raise ValueError(
            f"{', '.join(given)}: set in the environment, where {' and '.join(missing)} is missing; "
            f"start with torchrun, which sets all of them, or unset {'it' if len(given) == 1 else 'them'}"
        )
    for name in given:
        if not os.environ[name].isdecimal():
            raise ValueError(f"{name}: expected a whole number in the environment, got {os.environ[name]!r}")
    return bool(given), int(os.environ.get("LOCAL_RANK", "0"))


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of that name; raises ValueError where it is not to be had."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {name!r} asked for, but torch {torch.__version__} sees no CUDA device")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: {name!r} asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def gather_objects(value: Any, world: World) -> list[Any]:
    """The values of all processes, in the order of their ranks, on every process."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value, on every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def done_on_main(work: Callable[[], Any], world: World) -> Any:
    """What `work` returns on the first process, which alone runs it; where it raises, all processes raise that."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if world.is_main:
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, error
    value, error = broadcast_object(outcome, world)
    if error is not None:
        raise error
    return value


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; each process gives as many. Collective.

    Own rows keep their gradient, times the number of processes: of a loss that every process makes of all rows alike,
    the mean of the processes' gradients is then that of one process with all rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    size = dist.get_world_size()
    own = rows.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own)
    if rows.is_floating_point():
        parts[dist.get_rank()] = own + size * (rows - own)
    return torch.cat(parts)


def mean_over_world(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The mean of a tensor over the processes (a new tensor)."""
    if world.size == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world.size
