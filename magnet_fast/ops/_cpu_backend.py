"""The C++ kernels of the torch-free extension `magnet_fast._cpu`: loading it, and what goes into it."""

from __future__ import annotations

# The extension must find torch's OpenMP runtime loaded: one thread pool then serves both.
import torch
from torch import Tensor

try:
    from magnet_fast import _cpu as extension
except ModuleNotFoundError:
    extension, missing = None, "extension magnet_fast._cpu is not built"
except ImportError as error:
    extension, missing = None, f"extension magnet_fast._cpu cannot be loaded: {error}"
else:
    missing = None
"""Why the extension cannot be used, or None."""


def supports(*arguments: object) -> str | None:
    """None when the arguments' tensors are on the CPU, else the reason why not."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    return None if first.device.type == "cpu" else f"device {first.device.type} is not supported, CPU tensors only"


def passed_over(*arguments: object) -> str | None:
    """Why `auto` leaves float64 to the reference."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    return "float64 runs in scalar code, meant for gradient checks" if first.dtype == torch.float64 else None


def computed(like: Tensor) -> torch.dtype:
    """What kernels compute in beside a tensor like this, and the dtype of the small sums that they return."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32
