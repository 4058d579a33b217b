"""What the Triton kernels share: products, precision, launches, and the choice of a launch's configuration."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources, PTXASError

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Dtypes that the kernels read and write; all of them compute in float32."""

LARGEST_GRID = 2**31 - 1
"""Programs of one launch: everything goes on grid.x, because grid.y and grid.z end at 65,535."""

# Few, so that small inputs have programs that walk over several pieces of work beside each other.
_INTERPRETED_MULTIPROCESSORS = 2

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)

T = TypeVar("T")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32; acc is None for 0. The interpreter would take bfloat16's bits for integers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def rounded(values, ELEMENT: tl.constexpr):
    """float32 values in dtype ELEMENT, to the nearest. The interpreter alone would cut bfloat16's digits off."""
    if _INTERPRETED:  # noqa: SIM102 - constant, and not
        if ELEMENT == tl.bfloat16:  # noqa: SIM300
            bits = values.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            values = bits.to(tl.float32, bitcast=True)
    return values.to(ELEMENT)


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s precision of float32 operands: "tf32" where torch's own products may use it, else "tf32x3".

    That is three products of TF32 pieces, as exact as float32 but for the last bit or two. "ieee" does without the
    matrix units and holds whole operands in registers: it is slower, and tiles of more than 32 channels spill.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`, and that `tl.dot` takes as a side (16 or more)."""
    return max(least, 1 << (size - 1).bit_length())


def grid(programs: int) -> tuple[int]:
    """The grid of a launch.

    Raises:
        ValueError: for more programs than one launch can have.
    """
    if not 0 < programs <= LARGEST_GRID:
        raise ValueError(f"programs: a launch has 1 to {LARGEST_GRID} programs, got {programs}")
    return (programs,)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launches inside the context go to the tensor's device (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has: persistent programs are counted in multiples of it."""
    if INTERPRETED:
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Autotuner:
    """Chooses a launch's configuration by timing the candidates, once for each key, and remembers it.

    What is chosen is kept in Triton's cache folder, by GPU model, kernel source, candidates and key, so the next
    process starts with it. (`triton.autotune` keys that file by architecture alone, and times inside a stream
    capture, which fails.) In the interpreter, and while a CUDA graph is captured before anything was chosen, the
    first candidate runs.

    Args:
        candidates: key -> the configurations worth trying for it, the best guess first.
        *kernels: the jitted functions that a launch runs.
    """

    def __init__(self, candidates: Callable[..., Sequence[triton.Config]], *kernels: Any) -> None:
        self.candidates = candidates
        self.kernels = kernels
        self._chosen: dict[tuple, triton.Config] = {}
        self._lock = threading.Lock()

    def __call__(self, launch: Callable[[triton.Config], T], device: torch.device, *key: Any) -> T:
        """Runs `launch(config)` with the configuration for `key` and returns its result.

        Args:
            launch: does one whole launch, outputs included. It is called many times while candidates are timed, so
                it must add to nothing that an earlier call left: it makes, or zeroes, what it accumulates into.
            device: where it runs.
            *key: what the choice depends on: sizes and dtypes that shape the program, never the batch.
        """
        known = (device, *key)
        if known not in self._chosen:
            chosen = self._choose(launch, device, key)
            if chosen is None:
                return launch(self.candidates(*key)[0])
            self._chosen[known] = chosen
        return launch(self._chosen[known])

    def _choose(self, launch: Callable[[triton.Config], Any], device: torch.device, key: tuple) -> triton.Config | None:
        """The configuration for a key; None where nothing may be timed now."""
        candidates = list(self.candidates(*key))
        if INTERPRETED or len(candidates) == 1:
            return candidates[0]
        with self._lock:
            name, cache = f"{self.kernels[0].__name__}.choice.json", self._cache(device, candidates, key)
            chosen = _read(cache.get_file(name), candidates)
            if chosen is None and not torch.cuda.is_current_stream_capturing():
                chosen = min(candidates, key=lambda config: _milliseconds(launch, config))
                cache.put(json.dumps({"key": repr(key), "chosen": str(chosen)}), name, binary=False)
            return chosen

    def _cache(self, device: torch.device, candidates: Sequence[triton.Config], key: tuple) -> Any:
        parts = [triton.__version__, torch.cuda.get_device_name(device), *(k.cache_key for k in self.kernels)]
        parts += [repr(key), *map(str, candidates)]
        return get_cache_manager(hashlib.sha256("\n".join(parts).encode()).hexdigest())


def _read(path: str | None, candidates: Sequence[triton.Config]) -> triton.Config | None:
    """The candidate that the file names; None without one (another process may have left half a file)."""
    if path is None:
        return None
    try:
        with open(path) as file:
            name = json.load(file)["chosen"]
    except (OSError, ValueError, KeyError):
        return None
    return next((config for config in candidates if str(config) == name), None)


def _milliseconds(launch: Callable[[triton.Config], Any], config: triton.Config) -> float:
    """Median time of a launch with a cold L2; infinity where the device cannot run the configuration."""
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=10, rep=50, return_mode="median")
    except (OutOfResources, PTXASError, torch.OutOfMemoryError):
        return float("inf")
