"""Packed Linears one after the other, and the norms and sums around them, in one pass over the rows (C++, CPU).

A feed-forward network is four times as wide inside as outside: layer by layer, what lies between two of them goes out
to memory and comes back. Here some hundred rows at a time pass through all layers, and stay in a core's cache. The
products themselves are at most as fast as oneDNN's; what is gained is everything around them. Level amx proves itself
before it is taken, as all its kernels do (`_proof`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.ops import _cpu_backend, _packed, _proof
from magnet_fast.ops._linear import Activation, PackedLinear, inference_on_cpu, pack_linear
from magnet_fast.ops._observed import observed
from magnet_fast.ops._view import DTYPE_CODES, view

OPERATOR = "linear_chain"
"""Its name in proofs."""
DTYPES = (torch.float32, torch.bfloat16)

_ACTIVATIONS = {None: 0, "gelu": 1, "relu": 2}
_NO_NORM = (0, 0, -1.0)


class Step(NamedTuple):
    """`after(activation(linear(before(x))))`, or `after(linear(before(x)) + residual)`."""

    linear: nn.Linear
    activation: Activation | None = None
    residual: int | Literal["given"] | None = None
    """The output of the step of that index, or what `run` is given; not together with an activation."""
    before: nn.LayerNorm | None = None
    after: nn.LayerNorm | None = None


def runs(x: Tensor, steps: Sequence[Step], residual: Tensor | None = None, around: Iterable[nn.Module] = ()) -> bool:
    """Whether `run` computes what these layers compute: packed Linears, LayerNorms over the last dimension, and
    nothing that is more than that (an adapter, a hook).

    Args:
        x, steps, residual: as in `run`.
        around: modules that hold the layers and would not be called; none of them may be observed.
    """
    linears = [step.linear for step in steps]
    if not all(type(layer) is PackedLinear for layer in linears) or not _worthwhile(x.dtype):  # quickly said
        return False
    norms = [norm for step in steps for norm in (step.before, step.after) if norm is not None]
    if not all(type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 for norm in norms):
        return False
    parameters = [parameter for layer in (*linears, *norms) for parameter in layer.parameters(recurse=False)]
    return (
        inference_on_cpu(x, *parameters, *(() if residual is None else (residual,)))
        and not observed(*linears, *norms, *around)
        and all(size % _step(x.dtype) == 0 for layer in linears for size in layer.weight.shape)
        and all(_packed.keeps(layer.weight) and not _packed.is_int8(layer) for layer in linears)
        and all(parameter.is_contiguous() for parameter in parameters)
        and _proof.proved(OPERATOR, x.dtype, lambda: check(x.dtype))
    )


def run(x: Tensor, steps: Sequence[Step], residual: Tensor | None = None) -> Tensor:
    """The steps one after the other, where `runs` says so.

    Args:
        x: (..., C), C the first Linear's inputs.
        steps: at least one.
        residual: (..., D) of x's dtype, for the steps that ask for the given one.

    Returns:
        (..., D'), D' the last Linear's outputs.

    Raises:
        ValueError: sizes that do not fit together, or an activation and a residual at once.
    """
    leading, given = x.shape[:-1], None
    rows = _rows("x", x, (*leading, steps[0].linear.in_features), x.dtype)
    for step in steps:
        if step.residual == "given":
            given = _rows("residual", residual, (*leading, step.linear.out_features), x.dtype)
    y = x.new_empty((*leading, steps[-1].linear.out_features))
    packed = [_packed.in_chains(step.linear.weight) for step in steps]  # alive until the call is over
    _cpu_backend.extension.linear_chain_forward(
        x=view(rows),
        residual=view(given),
        y=view(y.view(len(rows), y.shape[-1])),
        layers=[_layer(step, weight) for step, weight in zip(steps, packed, strict=True)],
        threads=torch.get_num_threads(),
    )
    return y


def why_unchecked(dtype: torch.dtype) -> str | None:
    """None where `check` can run, else why not."""
    if _cpu_backend.missing is not None:
        return _cpu_backend.missing
    return None if _worthwhile(dtype) else f"level {_cpu_backend.extension.simd_level()} does not take {dtype}"


def check(dtype: torch.dtype) -> _proof.Verdict:
    """A small feed-forward network with odd sizes against the same in float64, by the error rule."""
    with _proof.undisturbed(), torch.no_grad():
        torch.manual_seed(0)  # of the generator that is given back
        norm, first, second = nn.LayerNorm(48), nn.Linear(48, 144), nn.Linear(144, 48)
        x, residual = (torch.randn(37, 48, device="cpu").to(dtype) for _ in range(2))
        layers = [layer.to(dtype).requires_grad_(False) for layer in (norm, first, second)]

        def plainly(in_: torch.dtype) -> Tensor:
            norm, first, second = (copy.deepcopy(layer).to(in_) for layer in layers)
            return second(F.gelu(first(norm(x.to(in_))))) + residual.to(in_)

        truth, plain = plainly(torch.float64), plainly(dtype)
        for layer in layers[1:]:
            pack_linear(layer)
        ours = run(x, [Step(first, "gelu", before=norm), Step(second, residual="given")], residual)
        share = _proof.share(ours, plain, truth, dtype)
    return _proof.Verdict(share <= 1, f"largest error {share:.3g} of what is allowed")


def _rows(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(rows, C), each row contiguous, all of them equally far apart and at addresses that the kernel reads."""
    if x is None or x.shape != shape or x.dtype != dtype:
        got = "None" if x is None else f"{tuple(x.shape)} of {x.dtype}"
        raise ValueError(f"{name}: expected {shape} of {dtype}, got {got}")
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    apart = rows.stride(0)
    fits = rows.stride(1) == 1 and apart >= rows.shape[1] and apart % 2 == 0 and rows.data_ptr() % 4 == 0
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)


def _layer(step: Step, packed: Tensor) -> tuple[object, ...]:
    outputs, inputs = step.linear.weight.shape
    return (
        inputs,
        outputs,
        packed.data_ptr(),
        0 if step.linear.bias is None else step.linear.bias.data_ptr(),
        _ACTIVATIONS[step.activation],
        {None: -2, "given": -1}.get(step.residual, step.residual),
        _norm("before", step.before, inputs),
        _norm("after", step.after, outputs),
    )


def _norm(name: str, norm: nn.LayerNorm | None, width: int) -> tuple[int, int, float]:
    if norm is None:
        return _NO_NORM
    if norm.normalized_shape != (width,):
        raise ValueError(f"{name}: expected a norm of {width} channels, got {norm.normalized_shape}")
    weight, bias = (0 if tensor is None else tensor.data_ptr() for tensor in (norm.weight, norm.bias))
    return weight, bias, norm.eps


def _step(dtype: torch.dtype) -> int:
    return _cpu_backend.extension.linear_chain_step(dtype=DTYPE_CODES[dtype])


def _worthwhile(dtype: torch.dtype) -> bool:
    """Whether the level in use multiplies as fast as oneDNN, whose bfloat16 uses AMX wherever it is."""
    if _cpu_backend.missing is not None:
        return False
    level = _cpu_backend.extension.simd_level()
    if dtype == torch.float32:
        return level in ("avx512", "avx512_bf16", "amx")
    return level == "amx" or (level == "avx512_bf16" and not _has_amx())


@cache
def _has_amx() -> bool:
    return "amx" in _cpu_backend.extension.supported_simd_levels()
