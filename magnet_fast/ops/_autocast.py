"""Autocast as `scaled_dot_product_attention` does it: inputs are cast first, the body runs without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# Asked once: torch 2.11 cannot trace the question in a compiled graph.
_KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(kind)
)


def active(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`; some devices (meta) have none."""
    kind = like.device.type
    return kind in _KINDS and torch.is_autocast_enabled(kind)


def cast(x: Tensor) -> Tensor:
    """`x` in autocast's dtype where autocast is on; float64 is never touched (autocast's own rule)."""
    if not active(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def cast_low(x: Tensor) -> Tensor:
    """As `cast`, but float32 stays: for what an operator takes in float32 beside low precision."""
    return x if x.dtype == torch.float32 else cast(x)


def disabled(like: Tensor) -> AbstractContextManager:
    """Turn autocast off for the body of an operator: its precision is the operator's own business."""
    return torch.autocast(like.device.type, enabled=False) if active(like) else nullcontext()


def off(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function on the CPU that autocast does not change.

    `torch.autocast` as a decorator keeps what to go back to in one place for all calls: of two threads in the function
    at once, the one would come out with the other's autocast.
    """

    @wraps(function)
    def run(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return run
