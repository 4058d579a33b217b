"""Checkpoints that survive a kill at any moment, and that a run goes on from as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from magnet_fast.atomic import write_atomically
from magnet_fast.models.files import dict_of
from magnet_fast.models.tensor_file import TensorFile
from magnet_fast.training.distributed import World, broadcast_object

FORMAT = "magnet_fast.training/3"
_FORMER = ("magnet_fast.training/2",)
CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(state: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint of tensors and plain containers, atomically, as a safetensors file.

    The tensors lie in it under their path ("optimiser/state/0/exp_avg"); the metadata hold `format` and, as JSON,
    the `state` without them. Nothing is pickled.

    Raises:
        TypeError: the state holds something else than tensors, numbers, text, None and containers of these.
    """
    skeleton, tensors = _taken_apart(state)
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
        ValueError: not a safetensors file, not a training checkpoint, or one of a former format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with TensorFile(path) as file:
            metadata = file.metadata()
            if metadata.get("format") in _FORMER:
                raise ValueError(
                    f"{path}: this run was begun by an earlier version (format {metadata['format']!r}, expected "
                    f"{FORMAT!r}) and cannot be resumed; evaluate it as it is, or start a new run from its weights, "
                    f"--set model.weights={path}"
                )
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a training checkpoint of this package (expected format {FORMAT!r})")
            return _with_tensors(dict_of(metadata, "state", str(path)), file.get_tensor)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable checkpoint: its state is of another form ({error})") from error


def hand_out(state: dict[str, Any] | None, world: World) -> dict[str, Any] | None:
    """The first process's state, on every process; what the others pass is not looked at. Collective.

    Tensors travel one by one, so that no process ever holds the state twice.
    """
    if world.size == 1:
        return state
    skeleton, tensors, shapes = None, {}, None
    if world.is_main and state is not None:
        skeleton, tensors = _taken_apart(state)
        shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    skeleton, shapes = broadcast_object((skeleton, shapes), world)
    if skeleton is None:
        return None
    for name, (shape, dtype) in shapes.items():
        value = tensors[name] if world.is_main else torch.empty(shape, dtype=dtype, device="cpu")
        if value.numel():
            dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)
        tensors[name] = value
    return state if world.is_main else _with_tensors(skeleton, tensors.__getitem__)


_TENSOR, _ITEMS = "$tensor", "$items"


def _taken_apart(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A JSON form of the state, and its tensors by their path."""
    tensors: dict[str, Tensor] = {}
    return _without_tensors(state, "", tensors), tensors


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON form of the value; its tensors go to `tensors`."""
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
    if value.keys() != {_ITEMS}:
        return {key: _with_tensors(entry, tensor) for key, entry in value.items()}
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in value[_ITEMS]):
        raise TypeError(f"{_ITEMS}: expected pairs of a key and its value, got other entries")
    return {key: _with_tensors(entry, tensor) for key, entry in value[_ITEMS]}
