"""Our own model files: one .safetensors with the configuration in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .lavt import LAVT
from .magnet import MagNet
from .presets import from_config
from .released import load_strictly

FORMAT = "magnet_fast.model/1"


def save_model(model: nn.Module, path: str | os.PathLike[str], extra: dict[str, str] | None = None) -> None:
    """Write weights and configuration to `path` (.safetensors), atomically: a reader never sees half a file.

    Args:
        extra: more metadata, text to text (image size, tokenizer, how it was trained).
    """
    path = Path(path)
    metadata = {**(extra or {}), "format": FORMAT, "config": model.config.model_dump_json()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(path: str | os.PathLike[str]) -> tuple[MagNet | LAVT, dict[str, str]]:
    """The model of a file that `save_model` wrote, in evaluation mode on the CPU, and the file's metadata.

    Raises:
        FileNotFoundError: no such file. ValueError: not such a file, or weights that do not fit its configuration.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"model file {name!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"model file {name!r} has format {metadata.get('format')!r}, expected {FORMAT!r}: "
                    "it was not written by magnet_fast"
                )
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"model file {name!r} is not a readable .safetensors file: {error}") from error
    model = from_config(json.loads(metadata["config"]))
    load_strictly(model, state, f"model file {name!r}")
    return model.eval(), metadata
