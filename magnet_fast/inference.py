"""Segment what an expression names: from a checkpoint and an image to a mask at the image's own size."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.data import Tokenizer
from magnet_fast.data.transforms import as_rgb, prepare_image
from magnet_fast.fast import accelerate

RELEASED_IMAGE_SIZE = 480
RELEASED_MAX_WORDS = 20
PRECISIONS = ("float32", "bfloat16", "float16")
_EXPRESSIONS_AT_ONCE = 16

ImageLike = str | os.PathLike | Image.Image | np.ndarray


class Segmentation(NamedTuple):
    """What a `Segmenter` finds, at the image's own size.

    Attributes:
        mask: (H, W) bool, the referent.
        probability: (H, W) float32 in [0, 1]; the mask is where it exceeds 0.5.
    """

    mask: np.ndarray
    probability: np.ndarray


class Segmenter:
    """A model with its tokenizer: ``segmenter(image, "the red circle")``.

    Args:
        model: a model of this package; moved to ``device`` and put into eval mode.
        tokenizer: turns expressions into what the model's text encoder was trained on.
        image_size: side of the square that images are squashed to.
        device: default: the device the model is on.
        dtype: "float32", "bfloat16" or "float16" for weights and features (sums, norms and softmaxes stay in
            float32, and so do the mask's resizing and its probabilities); default: what the model has.
        compile: torch.compile the model, on a GPU with CUDA graphs. Shapes are static: the image is a square
            anyway, and the number of expressions is filled up to 1, 2, 4, 8 or 16, each of which compiles at its
            first use (a minute or so). Pays where many images follow.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        image_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
    ) -> None:
        model = model if device is None else model.to(device)
        self.model = (model if dtype is None else in_precision(model, dtype)).eval()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.device = next(model.parameters()).device
        self.compile = compile
        if compile:
            # The forward pass alone: the mask's resizing to each image's own size stays outside of the graph.
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.model.compile(fullgraph=True, dynamic=False, mode=mode)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
        tokenizer: str | os.PathLike | Tokenizer | None = None,
        image_size: int | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        freeze: bool = True,
    ) -> Segmenter:
        """Load a segmenter.

        Args:
            path: our ``.safetensors`` (a run's weights, or its ``checkpoint.safetensors``), or a released MagNet
                or LAVT ``.pth``; None for the weights of the tiny model that ship with the package.
            device: default: the CPU.
            tokenizer: a ``vocab.txt``, a folder with one or with a ``tokenizer.json``, or a `Tokenizer`. None
                takes the shipped vocabulary, where the checkpoint was trained on it. Released checkpoints
                need BERT's.
            image_size: default: what the checkpoint was trained at; 480 for released ones.
            dtype: as in `Segmenter`; default: float32.
            compile: as in `Segmenter`.
            freeze: on a CPU, keep a packed copy of every Linear's weight, as `magnet_fast.accelerate(model,
                freeze=True)` does: every image after the first is faster, for the memory of the weights once more.
                False where a single image is asked about, or where ``model``'s weights are to be written through
                ``.data``, which the copies do not see.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a checkpoint of a model of this package, a vocabulary that is not the checkpoint's,
                or a dtype that does not run here.
        """
        loaded = load_checkpoint_model(path)
        segmenter = cls(
            loaded.model,
            loaded.tokenizer(tokenizer),
            image_size or loaded.image_size,
            device,
            dtype,
            compile,
        )
        if freeze:
            frozen_on_cpu(segmenter.model)
        return segmenter

    @overload
    def __call__(self, image: ImageLike, expression: str) -> Segmentation: ...

    @overload
    def __call__(self, image: ImageLike, expression: list[str]) -> list[Segmentation]: ...

    def __call__(self, image: ImageLike, expression: str | list[str]) -> Segmentation | list[Segmentation]:
        """Find what an expression names in an image.

        Args:
            image: a path, a PIL image, or an (H, W, 3) uint8 RGB array; pixels as stored, EXIF orientation is
                ignored.
            expression: a sentence, or several about this image. What exceeds the tokenizer's length is cut
                off.

        Returns:
            A `Segmentation`, or a list of them, in the order of the expressions.

        Raises:
            FileNotFoundError, ValueError, TypeError: the image cannot be read or has another layout; an
                expression is empty or not a string.
        """
        single = isinstance(expression, str)
        if not single and not isinstance(expression, list | tuple):
            kind = type(expression).__name__
            raise TypeError(f"expression: expected a string or a list of strings, got {kind}")
        expressions = [expression] if single else list(expression)
        if not all(isinstance(entry, str) for entry in expressions):
            kinds = ", ".join(sorted({type(entry).__name__ for entry in expressions}))
            raise TypeError(f"expression: expected a string or a list of strings, got a list with {kinds}")
        if not expressions:
            return []
        input_ids, attention_mask = self.tokenizer(expressions)
        picture = as_rgb(image)
        pixels = prepare_image(picture, self.image_size)[None].to(self.device)
        size = (picture.height, picture.width)
        found = []
        with torch.inference_mode():
            for start in range(0, len(expressions), _EXPRESSIONS_AT_ONCE):
                ids = input_ids[start : start + _EXPRESSIONS_AT_ONCE]
                words = attention_mask[start : start + _EXPRESSIONS_AT_ONCE]
                probability = self._predict(pixels, ids, words, size)
                found += [Segmentation(entry > 0.5, entry) for entry in probability]
        return found[0] if single else found

    def _predict(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, size: tuple[int, int]) -> np.ndarray:
        """(1, 3, S, S) and (N, T) to probabilities (N, height, width)."""
        count = len(input_ids)
        # Repeated expressions fill the batch up to one of the sizes that are compiled.
        rows = torch.arange(1 << (count - 1).bit_length() if self.compile else count) % count
        ids, words = input_ids[rows].to(self.device), attention_mask[rows].to(self.device)
        same = pixels.expand(len(rows), -1, -1, -1)
        return self.model.predict(same, ids, words, size=size)[:count].float().cpu().numpy()


def in_precision(model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
    """The model with weights of a dtype, itself: inference in low precision without autocast's casts.

    Autocast would cast weights at every call and take norms and softmaxes in float32 through memory; the operators and
    PyTorch's norms keep float32 inside either way, and the masks agree as well (see the tests).

    Raises:
        ValueError: no such dtype, or one that does not run on the model's device.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise ValueError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {name!r}")
    if name == "float16" and next(model.parameters()).device.type == "cpu":
        raise ValueError("dtype: float16 is for GPUs (a CPU computes it slower than float32); take bfloat16")
    return model.to(getattr(torch, name))


def frozen_on_cpu(model: nn.Module) -> nn.Module:
    """The model, itself, its Linears' weights packed if it is on a CPU: for many images and weights that stay."""
    if next(model.parameters()).device.type == "cpu":
        accelerate(model, pack=True)
    return model


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model read from a file, with what the file says about its use.

    Attributes:
        model: on the CPU, in eval mode.
        source: the file, for messages.
        image_size: side of the square it was trained on.
        max_words: word pieces per expression, with [CLS] and [SEP].
        vocabulary: digest of the vocabulary it was trained with; None for released checkpoints, which use
            BERT's.
        metadata: everything else in the file.
    """

    model: nn.Module
    source: str
    image_size: int
    max_words: int
    vocabulary: str | None
    metadata: dict[str, str]

    def tokenizer(self, given: str | os.PathLike | Tokenizer | None = None) -> Tokenizer:
        """The tokenizer for this model, checked; ``given`` as in `Segmenter.from_checkpoint`."""
        known = self.model.config.text.vocab_size
        if given is None and self.vocabulary is None:
            raise ValueError(
                f"tokenizer: {self.source} was trained with BERT's vocabulary of {known} entries, which does "
                "not ship with this package; pass the path of its vocab.txt (bert-base-uncased)"
            )
        tokenizer = given if isinstance(given, Tokenizer) else Tokenizer(given, max_words=self.max_words)
        name = "the shipped vocabulary" if given is None else f"tokenizer {given}"
        if self.vocabulary is not None and vocabulary_digest(tokenizer) != self.vocabulary:
            raise ValueError(
                f"tokenizer: {self.source} was trained with another vocabulary than {name} "
                f"({tokenizer.vocab_size} entries); pass the one it was trained with"
            )
        if self.vocabulary is None and tokenizer.vocab_size != known:
            raise ValueError(
                f"tokenizer: {name} has {tokenizer.vocab_size} entries, but the text encoder of "
                f"{self.source} knows {known}"
            )
        return tokenizer


def load_checkpoint_model(path: str | os.PathLike | None = None) -> LoadedCheckpoint:
    """Read any checkpoint that `Segmenter.from_checkpoint` accepts."""
    path = Path(path) if path is not None else shipped_weights()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        model, metadata = _read_training_checkpoint(path) or models.load_model(path)
        return _described(model, path, metadata)
    # A released file, or something else: the reader of released files says what is missing.
    model = models.from_released(path)
    return LoadedCheckpoint(model.eval(), str(path), RELEASED_IMAGE_SIZE, RELEASED_MAX_WORDS, None, {})


def shipped_weights() -> Path:
    """The weights that ship with the package; FileNotFoundError where an installation lacks them."""
    path = Path(str(resources.files("magnet_fast"))) / "weights" / "magnet_tiny_scenes.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this installation has no shipped weights; name a checkpoint")
    return path


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokenizer's tokens in the order of their ids: in whichever file format."""
    text = tokenizer.vocab_path.read_text(encoding="utf-8")
    if tokenizer.vocab_path.suffix == ".json":
        ids = json.loads(text)["model"]["vocab"]
        tokens = sorted(ids, key=ids.__getitem__)
    else:
        tokens = [token.strip() for token in text.splitlines()]
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()


def _described(model: nn.Module, path: Path, metadata: dict[str, str]) -> LoadedCheckpoint:
    missing = [key for key in ("image_size", "max_words", "tokenizer_vocab") if key not in metadata]
    if missing:
        raise ValueError(
            f"{path}: its metadata lack {', '.join(missing)}; checkpoints for inference are written by "
            "training, or by models.save_model with these entries in extra"
        )
    return LoadedCheckpoint(
        model.eval(),
        str(path),
        int(metadata["image_size"]),
        int(metadata["max_words"]),
        metadata["tokenizer_vocab"],
        dict(metadata),
    )


def _read_training_checkpoint(path: Path) -> tuple[nn.Module, dict[str, str]] | None:
    """The model of a training checkpoint, with averaged weights where the run keeps them; None for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if not header.get("format", "").startswith("magnet_fast.training/"):
                return None
            run = json.loads(header["state"])
            folder = "ema/weights/model." if run.get("ema") else "model/"
            names = [key for key in file.keys() if key.startswith(folder)]  # noqa: SIM118 (not a dict)
            weights = {name.removeprefix(folder): file.get_tensor(name) for name in names}
    except SafetensorError:
        return None  # the reader of models says what is wrong
    model = models.from_config(run["model_config"])
    model.load_state_dict(weights)
    return model, run["metadata"]
