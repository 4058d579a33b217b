"""Weights that are promised to stay as they are: a second copy of each, laid out as products read it.

Otherwise every call brings the weight into that layout first, which costs a product of few rows most. The copy
is made in the first call, and again when the weight is seen to have changed: loaded, stepped by an optimiser, moved,
cast. What is written through `.data`, or by a program that shares the memory, PyTorch does not count; hence the
promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import DTYPE_CODES


@dataclass
class _Copy:
    """A packed weight's copy, and of what it is one."""

    packed: Tensor
    storage: StorageWeakRef
    state: tuple[object, ...]


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by identity; a copy of a weight is not packed


def pack(weight: Tensor) -> None:
    """From now on `in_products` and `in_chains` give packed copies of `weight`, while the weight lives."""
    if weight not in _copies:
        _copies[weight] = {}


def unpack(weight: Tensor) -> None:
    """The way back; the copies are gone."""
    _copies.pop(weight, None)


def keeps(weight: Tensor) -> bool:
    """Whether `weight` is packed, and its changes would be seen: a tensor made in inference mode counts none."""
    return len(_copies) > 0 and weight in _copies and not weight.is_inference()


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


def _current(weight: Tensor, layout: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    copies = _copies[weight]
    storage = StorageWeakRef(weight.untyped_storage())
    state = (weight.dtype, weight.shape, weight.stride(), weight.data_ptr(), weight._version)
    copy = copies.get(layout)
    # The reference keeps the storage's place from being taken by another, not its memory.
    if copy is None or copy.state != state or copy.storage != storage:
        copy = copies[layout] = _Copy(make(weight.detach().contiguous()), storage, state)
    return copy.packed


def _pack_for_chain(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    sizes = {"dtype": DTYPE_CODES[weight.dtype], "inputs": inputs, "outputs": outputs}
    count = _cpu_backend.extension.linear_chain_packed_bytes(**sizes)
    room = torch.empty(count + 63, dtype=torch.uint8, device="cpu")
    packed = room[-room.data_ptr() % 64 :][:count]
    _cpu_backend.extension.linear_chain_pack(weight_ptr=weight.data_ptr(), packed_ptr=packed.data_ptr(), **sizes)
    return packed
