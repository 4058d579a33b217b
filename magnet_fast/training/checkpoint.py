"""Checkpoints that survive a kill at any moment, and that a run goes on from as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "magnet_fast.training/2"
CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(state: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint of tensors and plain containers, atomically, as a safetensors file.

    The tensors lie in it under their path ("optimiser/state/0/exp_avg"); the metadata hold ``format`` and, as JSON,
    the ``state`` without them. Nothing is pickled.

    Raises:
        TypeError: the state holds something else than tensors, numbers, text, None and containers of these.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _without_tensors(state, "", tensors)
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in storages:  # safetensors refuses what shares memory
            tensors[name] = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
    metadata = {"format": FORMAT, "state": json.dumps(skeleton)}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU. Tuples come back as lists.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or not a training checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a training checkpoint of this package (expected format {FORMAT!r})")
            return _with_tensors(json.loads(metadata["state"]), file.get_tensor)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from error


_TENSOR, _ITEMS = "$tensor", "$items"


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON form of the value; its tensors go to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        below = f"{path}/" if path else ""
        inner = [(key, _without_tensors(entry, f"{below}{key}", tensors)) for key, entry in value.items()]
        # JSON's keys are text; an optimiser counts its parameters.
        return dict(inner) if all(isinstance(key, str) for key in value) else {_ITEMS: inner}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(entry, f"{path}/{index}", tensors) for index, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state: {path} is a {type(value).__name__}; expected tensors, numbers, text and containers")


def _with_tensors(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(entry, tensor) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensor(value[_TENSOR])
    pairs = value[_ITEMS] if value.keys() == {_ITEMS} else value.items()
    return {key: _with_tensors(entry, tensor) for key, entry in pairs}


def write_atomically(path: str | Path, write: Callable[[Any], None]) -> None:
    """Call ``write(file)`` on a temporary binary file beside ``path``, bring it to the disk, then rename it
    to ``path``.

    At every moment ``path`` is either what it was or complete; a temporary file left by a kill is
    overwritten.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def rng_state() -> dict[str, Any]:
    """States of all random generators a step may draw from: Python's, NumPy's, torch's and this GPU's."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
