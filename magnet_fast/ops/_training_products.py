"""The products of a Linear in training on a CPU in float32, each from the faster of PyTorch's two libraries.

PyTorch gives them to MKL, which on processors that are not Intel's runs AVX2 code, also where AVX-512 would do twice
the work in a cycle. oneDNN, part of the same build, runs what the processor has. Which is the faster is measured once
a machine, by `accelerate`, and kept on disk, so that a run that is resumed computes the same bits. oneDNN is taken
where it is clearly faster, which two runs of the measurement would not see differently.

Nothing is taken unmeasured, nor where deterministic algorithms or `MAGNET_FAST_CHOICE=guess` ask for what PyTorch does.
"""

from __future__ import annotations

import os
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast.ops import _kept, _trial
from magnet_fast.ops._observed import batched

FOLDER = "training-products"
"""Of the cache (`_kept`)."""

_CLEARLY = 0.85  # of MKL's time
_ROUNDS = 9
_ROWS, _WIDTH = 768, 512  # of what is measured: a product takes some two milliseconds on two cores
_FEWEST_MULTIPLICATIONS = 1 << 24  # below this, calling oneDNN and laying out its operands counts
_MANY_ROWS = 2048  # from which on a weight's gradient can be faster as a convolution's


class Products(NamedTuple):
    """Which products oneDNN computes faster here; and the seconds of each, MKL's and oneDNN's."""

    forward: bool
    input_gradient: bool
    weight_gradient: bool
    seconds: dict[str, tuple[float, float]]

    @property
    def any(self) -> bool:
        return self.forward or self.input_gradient or self.weight_gradient


_NAMES = ("forward", "input_gradient", "weight_gradient")
_found: dict[int, Products] = {}
"""By number of threads. Filled with `setdefault`: what a process begins with it goes on with."""


def measured() -> Products | None:
    """What is the faster here; measures if nobody has. None where PyTorch's own is asked for."""
    if _trial.mode() == "guess" or torch.are_deterministic_algorithms_enabled():
        return None
    threads = torch.get_num_threads()
    if (found := _found.get(threads)) is None:
        key = _key(threads)
        if (kept := _parsed(_kept.read(FOLDER, key) or {})) is None:
            seconds = _times()
            _kept.write_first(FOLDER, key, {"seconds": seconds}, lambda other: _parsed(other) is not None)
            # Another process of this machine may have been first: all take the same.
            kept = _parsed(_kept.read(FOLDER, key) or {}) or _judged(seconds)
        found = _found.setdefault(threads, kept)
    return found


def known() -> Products | None:
    """What `measured` has found in this process, for the threads it has now."""
    found = _found.get(torch.get_num_threads())
    if found is None or not found.any or _trial.mode() == "guess" or torch.are_deterministic_algorithms_enabled():
        return None
    return found


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is large enough, and some product is known to be faster by oneDNN."""
    return (
        x.dtype == torch.float32
        and x.dim() > 1
        and x.numel() * weight.shape[0] >= _FEWEST_MULTIPLICATIONS
        and known() is not None
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """`F.linear` with its gradients, and ReLU if asked for, where `worthwhile` says so.

    Args:
        x: (..., C) float32, dense, on the CPU, as the others.
        weight: (D, C).
        bias: (D), or None.
        relu: whether ReLU follows; it is part of the product.

    Returns:
        (..., D). Gradients of gradients are PyTorch's own.
    """
    return _Linear.apply(x, weight, bias, relu)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        products = known()
        if products is not None and products.forward:
            # With a slice itself oneDNN takes a thousand times as long.
            out = _onednn(x, weight.contiguous(), bias, "relu" if relu else "none")
        else:
            out = F.linear(x, weight, bias)
            out = out.relu_() if relu else out
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.products = products  # the threads may be others by then
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        if out is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        x_wanted, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        products = ctx.products
        # Gradients of gradients, or of many outputs at once, are left to functions that have them.
        plain = products is None or torch.is_grad_enabled() or batched(gradient)
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = of_weight = None
        if x_wanted:
            of_rows = rows @ weight if plain or not products.input_gradient else _onednn(rows, weight.contiguous().t())
            of_x = of_rows.reshape(x.shape)
        if weight_wanted:
            by_onednn = not plain and products.weight_gradient and len(rows) >= _MANY_ROWS
            of_weight = weight_gradient(rows, inputs) if by_onednn else rows.t() @ inputs
        return of_x, of_weight, rows.sum(0) if bias_wanted else None, None


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient.t() @ x` of (N, D) and (N, C): (D, C).

    oneDNN's product would want an operand transposed in memory, which takes what it gains. The gradient of a 1 x 1
    convolution is the same sum, and reads both as they lie: maps of one pixel's width with channels last.
    """
    maps = [rows.contiguous().view(1, len(rows), 1, -1).permute(0, 3, 1, 2) for rows in (gradient, x)]
    weight = x.new_empty(gradient.shape[1], x.shape[1], 1, 1)  # its shape alone is read
    one, none, only_weight = [1, 1], [0, 0], [False, True, False]
    found = torch.ops.aten.convolution_backward(*maps, weight, None, one, none, one, False, none, 1, only_weight)
    return found[1].view(weight.shape[:2])


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


# ---- Measuring ------------------------------------------------------------------------------------------------------


def _times() -> dict[str, tuple[float, float]]:
    """The fewest seconds of each product by MKL and by oneDNN, in turns: what other processes take only adds to
    them, and on a busy machine most turns have some of it."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        sizes = (_ROWS, _WIDTH), (_WIDTH, _WIDTH), (4 * _MANY_ROWS, _WIDTH // 2)
        x, weight, many = (torch.ones(size, dtype=torch.float32, device="cpu") for size in sizes)
        both = {
            "forward": (lambda: F.linear(x, weight), lambda: _onednn(x, weight)),
            "input_gradient": (lambda: x @ weight, lambda: _onednn(x, weight.t())),
            "weight_gradient": (lambda: many.t() @ many, lambda: weight_gradient(many, many)),
        }
        found: dict[str, tuple[float, float]] = {}
        for name, forms in both.items():
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(_ROUNDS + 1):
                for form, taken in zip(forms, times, strict=True):
                    begun = perf_counter()
                    form()
                    if turn > 0:  # the first lays things out
                        taken.append(perf_counter() - begun)
            found[name] = min(times[0]), min(times[1])
    return found


def _judged(seconds: dict[str, tuple[float, float]]) -> Products:
    return Products(*(ours < _CLEARLY * theirs for theirs, ours in map(seconds.__getitem__, _NAMES)), seconds)


def _parsed(answer: dict[str, Any]) -> Products | None:
    """An answer as it is kept on disk; None for what is none."""
    seconds = answer.get("seconds")
    if not isinstance(seconds, dict) or seconds.keys() != set(_NAMES):
        return None
    for pair in seconds.values():
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            return None
        if not all(isinstance(one, float) and 0 < one < 3600 for one in pair):
            return None
    return _judged({name: tuple(pair) for name, pair in seconds.items()})


def _key(threads: int) -> _kept.Key:
    key: _kept.Key = {"threads": threads, "package": _kept.package_version()}
    key["limits"] = {name: os.environ.get(name) for name in ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")}
    return key | _kept.machine(torch.device("cpu"))
