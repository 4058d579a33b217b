"""Weights that are promised to stay as they are: a second copy of each, laid out as products read it.

Otherwise every call brings the weight into that layout first, which costs a product of few rows most. The copy
is made in the first call, and again when the weight is seen to have changed: loaded, stepped by an optimiser, moved,
cast. What is written through `.data`, or by a program that shares the memory, PyTorch does not count; so a few hundred
values, spread over rows and columns, are compared in every call. That sees what changes a weight as a whole (an adapter
merged, an average copied), and not a write to a few values; hence the promise.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import DTYPE_CODES

_COMPARED = 64  # values of a weight in every call


@dataclass
class _Copy:
    """A packed weight's copy, and of what it is one."""

    packed: Tensor
    storage: StorageWeakRef
    state: tuple[object, ...]
    compared: (
        np.ndarray
    )  # a view of some of the weight's values: it keeps no memory alive, so only `state` makes it valid
    values: bytes


_copies: WeakKeyDictionary[nn.Module, dict[str, _Copy]] = WeakKeyDictionary()
"""Of each layer whose weight is packed, by layout; a copy of a layer is not packed."""

_layers: dict[int, weakref.ref[nn.Module]] = {}
"""By the id of the weight. A weak reference to the weight itself would forbid PyTorch's `swap_tensors`."""


def pack(layer: nn.Module) -> None:
    """From now on `in_products` and `in_chains` give packed copies of the layer's weight, while it has this weight."""
    if _found(layer.weight) is not None:
        return
    key = id(layer.weight)
    _layers[key] = weakref.ref(layer, lambda gone: _layers.pop(key) if _layers.get(key) is gone else None)
    _copies[layer] = {}


def unpack(layer: nn.Module) -> None:
    """The way back; the copies are gone."""
    _copies.pop(layer, None)


def keeps(weight: Tensor) -> bool:
    """Whether `weight` is packed, and its changes would be seen: a tensor made in inference mode counts none, and a
    slice of a wider one is not compared."""
    return _found(weight) is not None and not weight.is_inference() and weight.is_contiguous()


def in_products(weight: Tensor, rows: int) -> Tensor:
    """What to give to oneDNN's product in place of `weight`: its packed copy if it has one, else the weight itself,
    made contiguous: with a slice of a wider one oneDNN takes a thousand times as long.

    Args:
        weight: (D, C), of a dtype that oneDNN packs.
        rows: of the product, which the layout is chosen for when the copy is made; it is right for any number.
    """
    if not keeps(weight):
        return weight.contiguous()
    return _current(weight, "onednn", lambda dense: torch.ops.mkldnn._reorder_linear_weight(dense, rows))


def in_chains(weight: Tensor) -> Tensor:
    """The copy for `_linear_chain` of a weight that `keeps` says yes to, as bytes.

    Args:
        weight: (D, C), both multiples of what the SIMD level in use asks for.
    """
    return _current(weight, _cpu_backend.extension.simd_level(), _pack_for_chain)


def _found(weight: Tensor) -> dict[str, _Copy] | None:
    layer = reference() if (reference := _layers.get(id(weight))) is not None else None
    if layer is None or layer._parameters.get("weight") is not weight:
        return None
    return _copies.get(layer)


def _current(weight: Tensor, layout: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    copies = _found(weight)
    storage = StorageWeakRef(weight.untyped_storage())
    state = (weight.dtype, weight.shape, weight.stride(), weight.data_ptr(), weight._version)
    copy = copies.get(layout)
    # The reference keeps the storage's place from being taken by another, not its memory.
    if copy is None or copy.state != state or copy.storage != storage or copy.compared.tobytes() != copy.values:
        compared = _compared(weight)
        values = compared.tobytes()
        copy = copies[layout] = _Copy(make(weight.detach()), storage, state, compared, values)
    return copy.packed


def _compared(weight: Tensor) -> np.ndarray:
    """A view of about `_COMPARED` of a contiguous weight's values, as integers, in as many rows and columns."""
    outputs, inputs = weight.shape
    size, apart = weight.element_size(), max(1, outputs * inputs // _COMPARED)
    while math.gcd(apart, inputs) > 1:  # else they would stand in few columns
        apart -= 1
    memory = {
        "version": 3,
        "data": (weight.data_ptr(), True),
        "typestr": f"<i{size}",
        "shape": (-(-outputs * inputs // apart),),
        "strides": (apart * size,),
    }
    return np.asarray(SimpleNamespace(__array_interface__=memory))


def _pack_for_chain(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    sizes = {"dtype": DTYPE_CODES[weight.dtype], "inputs": inputs, "outputs": outputs}
    count = _cpu_backend.extension.linear_chain_packed_bytes(**sizes)
    room = torch.empty(count + 63, dtype=torch.uint8, device="cpu")
    packed = room[-room.data_ptr() % 64 :][:count]
    _cpu_backend.extension.linear_chain_pack(weight_ptr=weight.data_ptr(), packed_ptr=packed.data_ptr(), **sizes)
    return packed
