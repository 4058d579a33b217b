"""Weights that are promised to stay as they are: a second copy of each, laid out as products read it, or folded.

Otherwise every call brings the weight into that layout first, which costs a product of few rows most. The copy
is made in the first call, and again when the weight is seen to have changed: loaded, stepped by an optimiser, moved,
cast. What is written through `.data`, or by a program that shares the memory, PyTorch does not count; so a few values,
spread over rows and columns, are compared in every call, others in the next. That sees what changes a weight as a whole
(an adapter merged, an average copied), and not a write to a few values; hence the promise.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from magnet_fast.ops import _cpu_backend, _int8
from magnet_fast.ops._view import DTYPE_CODES

_COMPARED = 64  # values of a weight
# In as many calls. The weight itself is out of all caches, as its copy is read in its place: 64 values take some 150
# microseconds then, of one thread, while the others wait.
_TURNS = 8


class _Seen:
    """A tensor as it was when a copy was made of it. It keeps no memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        # The reference keeps the storage's place from being taken by another, not its memory.
        self.storage, self.state = StorageWeakRef(tensor.untyped_storage()), _state(tensor)
        compared = _compared(tensor)
        self.views = [compared[turn::_TURNS] for turn in range(_TURNS)]  # only `state` makes them valid
        self.values = [view.tobytes() for view in self.views]
        self.turn = 0

    def still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is that one, and nobody seems to have written to it."""
        if self.state != _state(tensor):
            return False
        turn = self.turn
        self.turn = (turn + 1) % _TURNS
        return self.views[turn].tobytes() == self.values[turn]


def _state(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()._cdata
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr(), storage, tensor._version


class _Copy(NamedTuple):
    """What was made of some tensors, and these as they were."""

    made: Any
    seen: list[_Seen]

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are those, as they were."""
        if len(self.seen) != len(tensors):
            return False
        for one, tensor in zip(self.seen, tensors, strict=True):  # noqa: SIM110 (a generator takes longer than this)
            if not one.still(tensor):
                return False
        return True


_copies: WeakKeyDictionary[nn.Module, dict[str, _Copy]] = WeakKeyDictionary()
"""Of each layer whose weight is packed, by layout; a copy of a layer is not packed."""

_layers: dict[int, weakref.ref[nn.Module]] = {}
"""By the id of the weight. A weak reference to the weight itself would forbid PyTorch's `swap_tensors`."""


_in_int8: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Of these layers, those that compute in int8."""


def pack(layer: nn.Module, *, int8: bool = False) -> None:
    """From now on `in_products` and `in_chains`, or `in_int8`, give packed copies of the layer's weight, while it has
    this weight."""
    if int8 != (layer in _in_int8):
        _copies.pop(layer, None)  # a copy of the other kind has served
    (_in_int8.add if int8 else _in_int8.discard)(layer)
    if _found(layer.weight) is not None:
        return
    key = id(layer.weight)
    _layers[key] = weakref.ref(layer, lambda gone: _layers.pop(key) if _layers.get(key) is gone else None)
    _copies[layer] = {}


def unpack(layer: nn.Module) -> None:
    """The way back; the copies are gone."""
    _copies.pop(layer, None)
    _in_int8.discard(layer)


def folded(
    layer: nn.Module,
    layout: str,
    settings: tuple[object, ...],
    sources: Sequence[Tensor],
    make: Callable[[], Any | None],
) -> Any | None:
    """What `make` gives, kept with a packed layer, one for each layout, until `settings` or one of `sources` changes.

    None for a layer that is not packed, where a change of a source would not be seen (they must count their versions,
    and their values must lie side by side), and where `make` gives none.
    """
    if (copies := _copies.get(layer)) is None or any(tensor.is_inference() for tensor in sources):
        return None
    copy = copies.get(layout)
    if copy is None or copy.made[0] != settings or not copy.still(sources):
        if not all(_dense(tensor) for tensor in sources) or (made := make()) is None:
            return None
        copy = copies[layout] = _Copy((settings, made), [_Seen(tensor) for tensor in sources])
    return copy.made[1]


def any_int8() -> bool:
    """Whether there is such a layer at all."""
    return len(_in_int8) > 0  # torch 2.11 cannot trace bool() of it


def is_int8(layer: nn.Module) -> bool:
    """Whether `pack` was last called for this very module to compute in int8."""
    return layer in _in_int8


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def keeps(weight: Tensor) -> bool:
    """Whether `weight` is packed, and its changes would be seen: a tensor made in inference mode counts none, and a
    slice of a wider one is not compared."""
    return _found(weight) is not None and not weight.is_inference() and weight.is_contiguous()


def in_products(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """What to give to oneDNN's product in place of `weight`: its packed copy if it has one, else the weight itself,
    made contiguous: with a slice of a wider one oneDNN takes a thousand times as long.

    Args:
        weight: (D, C).
        rows: of the product, which the layout is chosen for when the copy is made; it is right for any number.
        dtype: of the product, one that oneDNN packs; the weight's own where it `keeps` no copy.
    """
    if not keeps(weight):
        return weight.contiguous()
    return _current(
        _found(weight),
        f"onednn, {dtype}",
        (weight,),
        lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows),
    )


def in_chains(weight: Tensor) -> Tensor:
    """The copy for `_linear_chain` of a weight that `keeps` says yes to, as bytes.

    Args:
        weight: (D, C), both multiples of what the SIMD level in use asks for.
    """
    level = _cpu_backend.extension.simd_level()
    return _current(_found(weight), level, (weight,), lambda: _pack_for_chain(weight.detach()))


def in_int8(weight: Tensor, rows: int) -> Any:
    """The copy in int8 of a weight whose layer is to compute so; None for any other, and where it cannot be had.

    Args:
        weight: (D, C).
        rows: as in `in_products`.
    """
    if not keeps(weight) or _layers[id(weight)]() not in _in_int8:
        return None
    if any(size % _int8.WIDTHS for size in weight.shape) or not _int8.works():
        return None
    return _current(_found(weight), "int8", (weight,), lambda: _int8.quantise(weight.detach(), rows))


def _found(weight: Tensor) -> dict[str, _Copy] | None:
    layer = reference() if (reference := _layers.get(id(weight))) is not None else None
    if layer is None or layer._parameters.get("weight") is not weight:
        return None
    return _copies.get(layer)


def _current(copies: dict[str, _Copy], layout: str, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    copy = copies.get(layout)
    if copy is None or not copy.still(tensors):
        copy = copies[layout] = _Copy(make(), [_Seen(tensor) for tensor in tensors])
    return copy.made


def _compared(weight: Tensor) -> np.ndarray:
    """A view of about `_COMPARED` of a dense tensor's values, as integers, in as many rows and columns."""
    count = weight.numel()
    inputs = count // weight.shape[0]
    size, apart = weight.element_size(), max(1, count // _COMPARED)
    while math.gcd(apart, inputs) > 1:  # else they would stand in few columns
        apart -= 1
    memory = {
        "version": 3,
        "data": (weight.data_ptr(), True),
        "typestr": f"<i{size}",
        "shape": (-(-count // apart),),
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
