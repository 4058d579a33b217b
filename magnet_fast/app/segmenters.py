"""The checkpoints that a page offers, by name, each loaded once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from magnet_fast import checkpoints
from magnet_fast.data.tokenizers import ExpressionTokenizer
from magnet_fast.inference import Segmenter
from magnet_fast.models.files import is_safetensors


class Segmenters:
    """Segmenters by the names that the page shows: `segmenters(name, device)`.

    A name that is not among `names` is refused, so that nobody at a browser reads another file.

    Args:
        paths: checkpoints, as `checkpoints.load` takes them, called by their paths; those that ship with the package
            come last.
        tokenizer: a vocabulary for those of `paths` that do not say by themselves which is theirs, or whose own does
            not ship with the package.

    Attributes:
        names: of all checkpoints, in order; the first is the page's choice.

    Raises:
        TypeError: one path in place of a list.
        FileNotFoundError: one of the paths does not exist.
        ValueError: one of them is no file of weights at the first look. A whole look is taken as it is loaded.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]] = (), tokenizer: str | None = None) -> None:
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"paths: expected a list of paths, got {os.fspath(paths)!r}")
        for path in paths:
            if not checkpoints.is_pretrained(path):
                is_safetensors(path)
        shipped = checkpoints.shipped_weights()
        self._paths: dict[str, str | Path] = {str(path): str(path) for path in paths}
        self._paths[f"{shipped.stem} (shipped)"] = shipped
        self._paths[f"{checkpoints.PHOTOS} (shipped)"] = checkpoints.PHOTOS
        self._tokenizer = tokenizer
        self._loaded: dict[tuple[str, str], Segmenter] = {}

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def __call__(self, name: str, device: str) -> Segmenter:
        """The segmenter of a name on a device, loaded at the first call.

        Raises:
            ValueError: no such name, or the file cannot be read as a model or lacks a vocabulary.
        """
        if name not in self._paths:
            raise ValueError(f"checkpoint: expected one of {', '.join(self.names)}, got {name!r}")
        if (name, device) not in self._loaded:
            loaded = checkpoints.load(self._paths[name])
            # `pack` keeps what the model made of the last picture, for further sentences about it.
            segmenter = Segmenter(loaded.model, self._vocabulary(loaded), device=device, pack=True)
            self._loaded[name, device] = segmenter
        return self._loaded[name, device]

    def _vocabulary(self, loaded: checkpoints.Checkpoint) -> ExpressionTokenizer:
        """The checkpoint's own, where it says which and that ships; else the one that was given."""
        try:
            return loaded.tokenizer()
        except ValueError:
            if self._tokenizer is None:
                raise
            return loaded.tokenizer(self._tokenizer)
