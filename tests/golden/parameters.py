"""The released models' small configurations, with parameter values that follow from the parameter names alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


def parameter(name: str, shape: list[int]) -> Tensor:
    """Normal draws seeded by the name: around 1 for one-dimensional weights, small for biases, 1/√fan-in else."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) <= 1:
        draws = 1.0 + 0.1 * draws if name.endswith("weight") else 0.05 * draws
    else:
        draws = draws / np.sqrt(int(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(draws, dtype=np.float32))


def released_checkpoint(model: str) -> dict[str, dict[str, Tensor]]:
    """The contents of a released file: "magnet" {"model"} or "lavt" {"model", "bert_model"}."""
    description = json.loads((FOLDER / f"{model}_window7.json").read_text())
    if model == "magnet":
        return {"model": _state(description["state_dict"], "")}
    return {part: _state(description[part], f"{part}.") for part in ("model", "bert_model")}


def released_state(file: str) -> dict[str, Tensor]:
    """The state dict of a released model that has one alone, by the name of its golden file."""
    description = json.loads((FOLDER / f"{file}.json").read_text())
    return _state(next(description[key] for key in ("model", "state_dict") if key in description), "")


def golden(model: str) -> dict[str, Tensor]:
    """Inputs and outputs of the released code, by the model's name or that of its golden file."""
    file = model if (FOLDER / f"{model}.npz").exists() else f"{model}_window7"
    with np.load(FOLDER / f"{file}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _state(shapes: dict[str, list[int]], prefix: str) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("relative_position_index", "position_ids", "num_batches_tracked")):
            state[name] = torch.zeros(shape, dtype=torch.int64)  # recomputed or unused by every implementation
            continue
        value = parameter(prefix + name, shape)
        state[name] = value.abs() + 0.5 if name.endswith("running_var") else value
    return state
