"""Our own model files: one .safetensors with the configuration in its metadata."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from magnet_fast.atomic import write_atomically
from magnet_fast.devices import on_cpu
from magnet_fast.models import former
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.base_weights import load_bases, with_bases, without_bases
from magnet_fast.models.bounded import build_for
from magnet_fast.models.compact import compacted, expanded
from magnet_fast.models.files import dict_of, is_safetensors, read_safetensors, safetensors_metadata
from magnet_fast.models.state import load_strictly
from magnet_fast.models.wrapping import plain_name

_OURS = "magnet_fast.model/"
FORMAT = f"{_OURS}2"
FORMAT_ON_BASES = f"{_OURS}3"
"""Of a file that names base weights in place of holding them."""
FORMAT_COMPACT = f"{_OURS}4"
"""Of a file with matrices in int8."""
_READ = (FORMAT, FORMAT_ON_BASES, FORMAT_COMPACT, f"{_OURS}1")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    extra: dict[str, str] | None = None,
    *,
    whole: bool = True,
    compact: bool = False,
) -> None:
    """Write weights and configuration to `path` (.safetensors), atomically: a reader never sees half a file.

    How images and expressions are prepared (`model.spec`) is part of the configuration. Names are those of the plain
    model, also where torch.compile wrapped it.

    Args:
        extra: more metadata, text to text (vocabulary, how it was trained).
        whole: hold all weights. Otherwise those of an encoder that were loaded (`pretrained`) and are not trained are
            named by their source and their SHA-256, where they are at least half of it; `load` then loads them again.
        compact: matrices in int8, by row: about a quarter of the bytes. Weights are rounded; all of them are held.

    Raises:
        ValueError: `compact`, and weights that are not finite.
    """
    tensors = {plain_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors, bases = (tensors, {}) if whole or compact else without_bases(model, tensors)
    format = FORMAT_ON_BASES if bases else FORMAT
    if compact:
        tensors, format = compacted(tensors), FORMAT_COMPACT
    metadata = {**(extra or {}), "format": format, "config": model.config.model_dump_json()}
    metadata.pop("bases", None)  # of the file that the model came from
    if bases:
        metadata["bases"] = json.dumps(bases)
    write_atomically(path, lambda file: file.write(to_bytes(tensors, metadata)))


def load(path: str | os.PathLike[str]) -> ReferringModel:
    """The model of a file that `save` wrote, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, weights that do not fit its configuration, or a base that cannot be had or is
            another one than it was trained on.
    """
    return load_with_metadata(path)[0]


def load_with_metadata(path: str | os.PathLike[str]) -> tuple[ReferringModel, dict[str, str]]:
    """As `load`, and the file's metadata."""
    what = f"model file {os.fspath(path)!r}"
    metadata = safetensors_metadata(path) if is_safetensors(path) else {}
    format = metadata.get("format", "")
    if not format.startswith(_OURS):
        raise ValueError(
            f"{what} was not written by magnet_fast's models.save; models.from_released reads files that a system's "
            "authors released, and checkpoints.load any file with a model in it"
        )
    if format not in _READ:
        raise ValueError(f"{what} has format {format!r}, expected {FORMAT!r}: a later version wrote it, update")
    if "config" not in metadata:
        raise ValueError(f"{what} has no configuration in its metadata; models.save writes it")
    state, _ = read_safetensors(path)
    if format == FORMAT_COMPACT:
        state = expanded(state, what)
    bases, config = dict_of(metadata, "bases", what), dict_of(metadata, "config", what)
    return restored(config, state, metadata, what, bases), metadata


@on_cpu()
def restored(
    config: dict,
    state: dict[str, Tensor],
    metadata: dict[str, str],
    what: str,
    bases: dict[str, dict[str, Any]] | None = None,
) -> ReferringModel:
    """The model of a stored configuration and state dict, of the present format or a former one, in evaluation mode.

    Args:
        metadata: what stood beside the weights.
        what: they are called, in errors.
        bases: those that hold the rest of the state, as `without_bases` describes them.
    """
    state = {plain_name(name): tensor for name, tensor in state.items()}
    if former.is_former(config):
        try:
            beside = {key: int(metadata[name]) for key, name in _BESIDE.items() if name in metadata}
            config, state = former.present_config(config, **beside), former.present_state(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{what}: its configuration is no model's, of this version or an earlier one ({error!r:.200})"
            ) from error
    model = build_for(config, state, what, with_bases=bool(bases))
    if bases:
        load_bases(model, bases, what)
        state = with_bases(state, model.state_dict(), bases, what)
    load_strictly(model, state, what)
    return model.eval()


_BESIDE = {"size": "image_size", "max_tokens": "max_words"}
