"""Checks of the operators' arguments: each says which argument is wrong, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating_tensor(value: Any, name: str, dimensions: int, shape: str) -> None:
    """`value` is a non-empty tensor of one of the four floating types with `dimensions` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    dense(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {dtype_name(value.dtype)}")
    if value.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions {shape}, got shape {tuple(value.shape)}")
    for size in value.shape:
        if size < 1:
            raise ValueError(f"{name}: every dimension of {shape} must be at least 1, got shape {tuple(value.shape)}")


def dense(value: Tensor, name: str) -> None:
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")


def exact_shape(
    value: Tensor, name: str, expected: Sequence[int], because: str, *numbers: int | tuple[int, ...]
) -> None:
    """`because` may have a `{}` for each of `numbers`: not filled in where all is well, as in a compiled function
    numbers may be symbols, which not every version of PyTorch writes into a text."""
    if tuple(value.shape) != tuple(expected):
        told = because.format(*numbers)
        raise ValueError(f"{name}: expected shape {tuple(expected)} ({told}), got {tuple(value.shape)}")


def same_device(value: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def same_dtype(value: Tensor, name: str, other: Tensor, other_name: str, *, or_float32: bool = False) -> None:
    """Equal dtypes; with `or_float32` a float32 tensor may also stand beside a bfloat16 or float16 one."""
    if value.dtype == other.dtype:
        return
    low = other.dtype in (torch.bfloat16, torch.float16)
    if or_float32 and low and value.dtype == torch.float32:
        return
    allowed = dtype_name(other.dtype) + (" or float32" if or_float32 and low else "")
    raise TypeError(f"{name}: expected dtype {allowed} (that of {other_name}), got {dtype_name(value.dtype)}")


def contiguous_last(value: Tensor, name: str) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {tuple(value.stride())}")


def positive_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return _plain(value)


def int_pair(value: Any, name: str, minimum: int) -> tuple[int, int]:
    """An int, or a (height, width) pair of ints, each at least `minimum`."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected an int or a (height, width) pair, got {value!r}")
    if torch.jit.is_tracing():  # where the sizes of a tensor are tensors themselves; the trace is of this size
        pair = tuple(int(item) if isinstance(item, Tensor) else item for item in pair)
    for item in pair:
        if isinstance(item, bool) or not isinstance(item, (Integral, torch.SymInt)):
            raise TypeError(f"{name}: expected an int or a (height, width) pair of ints, got {value!r}")
        if item < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value!r}")
    return _plain(pair[0]), _plain(pair[1])


def positive_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return float(value)


def head_width(channels: int, num_heads: int, name: str) -> int:
    if channels % num_heads:
        raise ValueError(f"num_heads: {num_heads} heads do not divide the {channels} channels of {name}")
    return channels // num_heads


def qkv_map(qkv: Any, num_heads: Any) -> tuple[int, int]:
    """A projection (B, H, W, 3*C) of a map to q, k and v; returns the number of heads and the channels of each."""
    floating_tensor(qkv, "qkv", 4, "(B, H, W, 3*C)")
    if qkv.shape[3] % 3:
        raise ValueError(f"qkv: the last dimension holds q, k and v: expected a multiple of 3, got {qkv.shape[3]}")
    contiguous_last(qkv, "qkv")
    num_heads = positive_int(num_heads, "num_heads")
    return num_heads, head_width(qkv.shape[3] // 3, num_heads, "q, k and v each")


def _plain(value: Any) -> int:
    """numpy's ints become Python's, which the schemas want; sizes that dynamo made symbolic stay so."""
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
