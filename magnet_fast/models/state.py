"""State dicts: read safely, loaded strictly."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load all of `state`, or raise a ValueError that names the first differences."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape)
    problems = [
        f"{len(v)} {kind} ({', '.join(v[:3])})" for kind, v in (("missing", missing), ("unexpected", unexpected)) if v
    ]
    if wrong:
        first = wrong[0]
        shapes = f"{tuple(state[first].shape)}, expected {tuple(expected[first].shape)}"
        problems.append(f"{len(wrong)} of another shape ({first}: {shapes})")
    if problems:
        raise ValueError(f"{what} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state)


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping in a file of `torch.save`, tensors and plain containers only; a Namespace of arguments is allowed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds anything else, or is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {os.fspath(path)!r} does not exist")
    try:
        with torch.serialization.safe_globals([Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {os.fspath(path)!r} cannot be read safely: {reason}") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"checkpoint {os.fspath(path)!r} holds a {type(contents).__name__}, expected a dictionary")
    return contents


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    contents = read_checkpoint(path)
    return {name: value for name, value in contents.get("state_dict", contents).items() if isinstance(value, Tensor)}


def unreachable(role: str, name: str, error: Exception) -> ValueError:
    """What to say where published weights cannot be had."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"pretrained {role} weights {name!r} could not be loaded: {reason} "
        f"Neither network nor cache has them, or the name is wrong: give a local path "
        f"(pretrained={{'{role}': PATH}}) or build with pretrained=False."
    )
