"""Anything with a model in it: a run's weights, its checkpoint to resume from, what a system's authors released, a
folder that `save_pretrained` wrote, or a repository on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from magnet_fast.data.tokenizers import ExpressionTokenizer, open_tokenizer
from magnet_fast.models import hub
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.files import dict_of, is_safetensors, read_safetensors, safetensors_metadata
from magnet_fast.models.released import from_released
from magnet_fast.models.weights import load_with_metadata, restored

_HUB = "hub:"
PHOTOS = "photos"
"""Name of the model of photographs that ships with the package."""
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl")
_RUN = "magnet_fast.training/"  # format of a run's checkpoint, before its number


@dataclass(frozen=True)
class Checkpoint:
    """A model read from a file, with what the file says about its use.

    Attributes:
        model: on the CPU, in evaluation mode; `model.spec` says how images and expressions are prepared for it.
        source: the file, for messages.
        vocabulary: digest of the vocabulary it was trained with; None where the file does not say (released ones,
            those of `models.save` without it).
        metadata: everything else in the file.
        stored_tokenizer: what was saved beside the model; None where nothing was.
    """

    model: ReferringModel
    source: str
    vocabulary: str | None
    metadata: dict[str, str]
    stored_tokenizer: Path | None = None

    def tokenizer(self, given: str | os.PathLike[str] | ExpressionTokenizer | None = None) -> ExpressionTokenizer:
        """The tokenizer for this model, checked.

        Args:
            given: a vocabulary or its folder, or a tokenizer; None for the one saved beside the model, else for what
                the model's specification names: the shipped vocabulary, or the transformers folder that its text
                encoder came from.

        Raises:
            ValueError: a tokenizer is needed and none was given, or it is not the one that the model was trained with.
        """
        spec, known = self.model.spec, self.model.text_encoder.vocab_size
        given = self.stored_tokenizer if given is None else given
        if given is None and self.vocabulary is None and self.metadata:
            raise ValueError(
                f"tokenizer: {self.source}: its metadata lack tokenizer_vocab, so which vocabulary of {known} entries "
                "it was trained with is not known; pass it (vocab.txt), or write the file by training, or by "
                "models.save(model, PATH, {'tokenizer_vocab': tokenizer.digest()})"
            )
        if given is None and self.vocabulary is None:
            raise ValueError(
                f"tokenizer: {self.source} was trained with a vocabulary of {known} entries, which does not ship with "
                "this package; pass the path of its vocab.txt (of bert-base-uncased, for released checkpoints)"
            )
        if given is None or isinstance(given, str | os.PathLike):
            tokenizer = open_tokenizer(spec.tokenizer, vocabulary=given, max_tokens=spec.max_tokens)
        else:
            tokenizer = given
        name = "the tokenizer of the model's specification" if given is None else f"tokenizer {given}"
        if self.vocabulary is not None and not tokenizer.matches(self.vocabulary):
            raise ValueError(
                f"tokenizer: {self.source} was trained with another vocabulary than {name} "
                f"({tokenizer.vocab_size} entries); pass the one it was trained with"
            )
        if self.vocabulary is None and tokenizer.vocab_size != known:
            raise ValueError(
                f"tokenizer: {name} has {tokenizer.vocab_size} entries, but the model of {self.source} knows {known}"
            )
        return tokenizer


def load(path: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a model from any file.

    Args:
        path: our `.safetensors`, a run's weights or its `checkpoint.safetensors`; what a system's authors released, in
            any form that `models.from_released` reads; a folder that `save_pretrained` wrote; "hub:owner/name" or
            "hub:owner/name@revision" for a repository on the hub; None for the weights of the tiny model that ship with
            the package. Files are told by what is in them, not by their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no model of this package, or one that cannot be read safely; or it was trained on base
            weights that cannot be had, or that are other ones now; or as `models.hub.find`.
    """
    if path is not None and os.fspath(path).startswith(_HUB):
        repository, _, revision = os.fspath(path).removeprefix(_HUB).partition("@")
        return _read_pretrained(hub.fetch(repository, revision or None))
    if path is not None and is_pretrained(path):
        return _read_pretrained(hub.find(path))
    if path is not None and _is_shipped(path):
        return _read_pretrained(hub.find(_shipped(PHOTOS)))
    path = Path(path) if path is not None else shipped_weights()
    if not path.exists():
        if get_close_matches(str(path).lower(), [PHOTOS]):
            raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist; did you mean {PHOTOS!r}, which ships?")
        if _may_be_repository(path):
            raise FileNotFoundError(
                f"checkpoint {str(path)!r} does not exist; a repository on the hub is named {f'{_HUB}{path}'!r}"
            )
    format = safetensors_metadata(path).get("format", "") if is_safetensors(path) else ""
    if not format.startswith("magnet_fast."):
        # A released file, or something else: the reader of released files says what is missing.
        return Checkpoint(from_released(path), str(path), None, {})
    model, metadata = _read_run(path) if format.startswith(_RUN) else load_with_metadata(path)
    return Checkpoint(model, str(path), metadata.get("tokenizer_vocab"), dict(metadata))


def load_pretrained(source: str | os.PathLike[str], **where: Any) -> Checkpoint:
    """The model of a folder or of a repository on the hub, with the tokenizer saved beside it.

    Args:
        source, **where: as for `models.from_pretrained`, which also says what is raised.
    """
    return _read_pretrained(hub.find(source, **where))


def is_pretrained(path: str | os.PathLike[str]) -> bool:
    """Whether `path`, as `load` takes it, is no file: a repository on the hub, or a folder that holds a model."""
    return os.fspath(path).startswith(_HUB) or (Path(path) / hub.CONFIG).is_file()


def shipped_weights() -> Path:
    """The weights of drawn scenes that ship with the package; FileNotFoundError where an installation lacks them."""
    return _shipped("magnet_tiny_scenes.safetensors")


def _is_shipped(path: str | os.PathLike[str]) -> bool:
    """Whether a path that holds no model is the name of one that ships: a folder of pictures may be called so, a run's
    folder is one."""
    return os.fspath(path) == PHOTOS and not Path(path).is_file() and not any(Path(path).glob("*.safetensors"))


def _may_be_repository(path: Path) -> bool:
    """Whether a path that does not exist is rather owner/name: the name has no ending, and there is no such folder."""
    if len(path.parts) != 2 or path.suffix in _ENDINGS or path.parent.exists():
        return False
    try:
        return bool(hub.checked_name(str(path)))
    except ValueError:
        return False


def _shipped(name: str) -> Path:
    path = Path(str(resources.files("magnet_fast"))) / "weights" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this installation has no shipped weights; name a checkpoint")
    return path


def _read_pretrained(found: hub.Pretrained) -> Checkpoint:
    model, metadata = found.load()
    return Checkpoint(model, found.what, metadata.get("tokenizer_vocab"), dict(metadata), found.tokenizer)


def _read_run(path: Path) -> tuple[ReferringModel, dict[str, str]]:
    """The model of a run's checkpoint, with averaged weights where the run keeps them."""
    what = f"checkpoint {str(path)!r}"
    run = dict_of(safetensors_metadata(path), "state", what)
    config, metadata, bases = run.get("model_config"), run.get("metadata"), run.get("bases") or {}
    if not all(isinstance(one, dict) for one in (config, metadata, bases)):
        raise ValueError(f"{what}: its state lacks the model's configuration or metadata; download or copy it again")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{what}: its state has metadata that are no text; download or copy it again")
    weights, _ = read_safetensors(path, "ema/weights/model." if run.get("ema") else "model/")
    return restored(config, weights, metadata, f"{path}", bases), metadata
