"""Our own model files: one .safetensors with the configuration in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from magnet_fast.atomic import write_atomically
from magnet_fast.models import former
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.registry import from_config
from magnet_fast.models.state import load_strictly

FORMAT = "magnet_fast.model/2"
_READ = (FORMAT, "magnet_fast.model/1")


def save(model: nn.Module, path: str | os.PathLike[str], extra: dict[str, str] | None = None) -> None:
    """Write weights and configuration to `path` (.safetensors), atomically: a reader never sees half a file.

    How images and expressions are prepared (`model.spec`) is part of the configuration.

    Args:
        extra: more metadata, text to text (vocabulary, how it was trained).
    """
    metadata = {**(extra or {}), "format": FORMAT, "config": model.config.model_dump_json()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda file: file.write(to_bytes(tensors, metadata)))


def load(path: str | os.PathLike[str]) -> ReferringModel:
    """The model of a file that `save` wrote, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or weights that do not fit its configuration.
    """
    return load_with_metadata(path)[0]


def load_with_metadata(path: str | os.PathLike[str]) -> tuple[ReferringModel, dict[str, str]]:
    """As `load`, and the file's metadata."""
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"model file {name!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in _READ:
                raise ValueError(
                    f"model file {name!r} has format {metadata.get('format')!r}, expected {FORMAT!r}: "
                    "it was not written by magnet_fast"
                )
            if "config" not in metadata:
                raise ValueError(f"model file {name!r} has no configuration in its metadata")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"model file {name!r} is not a readable .safetensors file: {error}") from error
    return restored(json.loads(metadata["config"]), state, metadata, f"model file {name!r}"), metadata


def restored(config: dict, state: dict[str, Tensor], metadata: dict[str, str], what: str) -> ReferringModel:
    """The model of a stored configuration and state dict, of the present format or a former one, in evaluation mode.

    Args:
        metadata: what stood beside the weights.
        what: they are called, in errors.
    """
    if former.is_former(config):
        beside = {key: int(metadata[name]) for key, name in _BESIDE.items() if name in metadata}
        config, state = former.present_config(config, **beside), former.present_state(state)
    model = from_config(config)
    load_strictly(model, state, what)
    return model.eval()


_BESIDE = {"size": "image_size", "max_tokens": "max_words"}
