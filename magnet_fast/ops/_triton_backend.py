"""The Triton kernels of `magnet_fast.kernels`: whether this process can run them, and on which tensors.

Triton is not imported here: it takes long, and a process that runs no kernel of it needs none of it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from magnet_fast.ops._checks import dtype_name

# As Triton reads it, once: kernels are made for the interpreter or for GPUs when their file is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether the kernels run in Triton's interpreter, on CPU tensors: for tests, thousands of times slower."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    # By way of NVML where possible: CUDA stays uninitialised, and processes can still be forked.
    if not INTERPRETED and torch.cuda.device_count() == 0:
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


missing = _missing()
"""Why the kernels cannot be used in this process, or None."""


def supports(*arguments: object) -> str | None:
    """None when the kernels can take the arguments' tensors, else the reason why not."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    expected = "cpu" if INTERPRETED else "cuda"
    if first.device.type != expected:
        where = "CPU tensors under TRITON_INTERPRET=1" if INTERPRETED else "CUDA tensors"
        return f"device {first.device.type} is not supported, {where} only"
    if first.dtype not in DTYPES:
        return f"dtype {dtype_name(first.dtype)} is not supported, float32, bfloat16 and float16 only"
    if first.is_cuda and torch.version.hip is None and torch.cuda.get_device_properties(first.device).major < 8:
        return "the GPU is older than compute capability 8.0"
    return None


def passed_over(*arguments: object) -> str | None:
    """Why `auto` leaves CPU tensors alone."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    return None if first.is_cuda else "Triton's interpreter is for tests, not for speed"
