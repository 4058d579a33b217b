"""Weights that are promised to stay as they are: a second copy of each, laid out as oneDNN's products read it.

Otherwise every call brings the weight into that layout first, which costs a product of few rows most. The copy
is made in the first call, and again when the weight is seen to have changed: loaded, stepped by an optimiser, moved,
cast. What is written through ``.data``, or by a program that shares the memory, PyTorch does not count; hence the
promise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Entry:
    """A frozen weight's copy, and of what it is one; nothing before the first call."""

    packed: Tensor | None = None
    storage: StorageWeakRef | None = None
    state: tuple[object, ...] = ()


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by identity; a copy of a weight is not frozen


def freeze(weight: Tensor) -> None:
    """From now on :func:`in_products` gives a packed copy of `weight`, while the weight lives."""
    if weight not in _entries:
        _entries[weight] = _Entry()


def thaw(weight: Tensor) -> None:
    """The way back; the copy is gone."""
    _entries.pop(weight, None)


def in_products(weight: Tensor, rows: int) -> Tensor:
    """What to give to oneDNN's product in place of `weight`: the weight itself, or its packed copy if it is frozen.

    Args:
        weight: (D, C), dense, of a dtype that oneDNN packs.
        rows: of the product, which the layout is chosen for when the copy is made; it is right for any number.
    """
    entry = _entries.get(weight) if len(_entries) else None
    if entry is None or weight.is_inference():  # a tensor made in inference mode counts no changes
        return weight
    storage = StorageWeakRef(weight.untyped_storage())
    state = (weight.dtype, weight.shape, weight.stride(), weight.data_ptr(), weight._version)
    # The reference keeps the storage's place from being taken by another, not its memory.
    if entry.packed is None or entry.state != state or entry.storage != storage:
        entry.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        entry.storage, entry.state = storage, state
    return entry.packed
