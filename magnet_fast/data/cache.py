"""A data set's prepared pictures and masks in memory, which loader workers fill together, once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

_SHARED_MEMORY = "/dev/shm"


class ArrayCache:
    """Room for uint8 arrays of at most `size` bytes each, one a key, which all processes of a loader see.

    Memory for all of them is taken at once: where there is too little, that is said before training starts and not by
    a worker's death. Two workers that want the same array at the same time may both make it.

    Args:
        keys: of all arrays.
        size: bytes of the largest.
        what: for messages.
        shared: in shared memory; False keeps them in this process's own, for a loader without workers.

    Raises:
        ValueError: shared memory has no room for them.
    """

    def __init__(self, keys: Sequence[Hashable], size: int, what: str, shared: bool = True) -> None:
        self._slots = {key: slot for slot, key in enumerate(dict.fromkeys(keys))}
        if shared:
            _check_shared_memory(len(self._slots), size, what)
        self._bytes = torch.zeros(len(self._slots), size, dtype=torch.uint8, device="cpu")
        self._filled = torch.zeros(len(self._slots), dtype=torch.bool, device="cpu")
        if shared:
            self._bytes.share_memory_()
            self._filled.share_memory_()

    def get(self, key: Hashable, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a key, uint8 of this shape, made at its first use. A copy, the caller's own."""
        slot, count = self._slots[key], math.prod(shape)
        row = self._bytes[slot, :count].numpy()
        if not self._filled[slot]:
            row[:] = make().reshape(-1)
            self._filled[slot] = True
        return row.reshape(shape).copy()


def _check_shared_memory(count: int, size: int, what: str) -> None:
    needed, free = count * size, _free_shared_memory()
    if needed > free:
        raise ValueError(
            f"cache: {count} {what} need {needed / 2**20:.0f} MiB of shared memory, {free / 2**20:.0f} MiB of "
            f"{_SHARED_MEMORY} are free; give it more room (Docker: --shm-size) or switch the cache off"
        )


def _free_shared_memory() -> float:
    """Bytes; infinity where the system keeps shared memory elsewhere."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):
        return math.inf
    return status.f_bavail * status.f_frsize
