"""A run that cannot go on: which step was the first to go wrong, with which batch, kept for whoever looks into it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from magnet_fast.atomic import write_atomically, write_text_atomically
from magnet_fast.data.sample import collate
from magnet_fast.models.contract import Text
from magnet_fast.training.distributed import World, gather_objects
from magnet_fast.training.guard import NonFiniteGuard

FOLDER = "nonfinite"


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the gradient is NaN or infinite."""


def stop_training(
    guard: NonFiniteGuard, world: World, folder: Path, read: Callable[[int], tuple[Any, list[int], dict[str, Any]]]
) -> None:
    """Save each process's share of the first bad step, and raise TrainingError. Collective.

    Args:
        guard: has seen the step, in this process or in another.
        folder: of the files, made if absent.
        read: what a step saw, by its number: the dataset, the indices of this process's share, facts for the file.
    """
    found = gather_objects(guard.first(), world)
    step = min(entry[0] for entry in found if entry is not None)
    at_fault = [entry[1] for entry in found if entry is not None and entry[0] == step]
    names = [name for name in guard.watched if any(not math.isfinite(values[name]) for values in at_fault)]
    mine = found[world.rank]
    dataset, indices, facts = read(step)
    values = {key: str(value) for key, value in mine[1].items()} if mine and mine[0] == step else {}
    saved = save_batch(dataset, indices, folder, step, world.rank, {**facts, "values": values})
    gather_objects(None, world)  # all have saved theirs before the first one ends the run
    raise TrainingError(
        f"{' and '.join(names)} became NaN or infinite in step {step}, found after step {facts['found_after_step']}; "
        f"its batch is in {saved} and the .json beside it; {facts['checkpoint']}. Lower optimiser.lr, set clip_norm, "
        "lengthen schedule.warmup, or train in float32 or bf16"
    )


def save_batch(dataset: Any, indices: Sequence[int], folder: Path, step: int, rank: int, facts: dict[str, Any]) -> Path:
    """Write this process's share of a step's batch, read from the dataset again, and what is known of it.

    Args:
        dataset: items are samples; its `record(index)`, where it has one, says more of an item.
        indices: the items, in the order of the micro-batches.
        folder: made if absent.
        facts: plain values for the JSON file.

    Returns:
        `step-<step>-rank-<rank>.safetensors` with the stacked tensors ("text.ids" of a text's ids); beside it lies the
        same name in `.json`, with what else the samples say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}-rank-{rank}.safetensors"
    samples = [dataset[index] for index in indices]
    tensors = dict(_named_tensors(collate(samples)))
    write_atomically(path, lambda file: file.write(save(tensors)))
    described = [{key: value for key, value in sample.items() if _is_plain(value)} for sample in samples]
    if hasattr(dataset, "record"):  # the sentence itself, the image's file
        described = [{**dataset.record(index), **one} for index, one in zip(indices, described, strict=True)]
    content = {"step": step, "rank": rank, **facts, "indices": list(indices), "samples": described}
    write_text_atomically(path.with_suffix(".json"), json.dumps(content, indent=2, default=str) + "\n")
    return path


def _named_tensors(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for key, value in values.items():
        if isinstance(value, Text):
            value = value._asdict()
        if isinstance(value, dict):
            found += _named_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found.append((prefix + key, value.contiguous()))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple) and not isinstance(value, Text):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)
