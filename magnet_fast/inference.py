"""Segment what an expression names: from a checkpoint and an image to a mask at the image's own size."""

from __future__ import annotations

import os
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from magnet_fast import checkpoints
from magnet_fast.data.tokenizers import ExpressionTokenizer, Reading, shortened
from magnet_fast.data.transforms import Picture, as_rgb, as_shown, open_fit
from magnet_fast.evaluation.finite import nan_answers, where_nan_begins
from magnet_fast.fast import accelerate
from magnet_fast.models.contract import Text
from magnet_fast.ops._observed import observed

PRECISIONS = ("float32", "bfloat16", "float16")
_EXPRESSIONS_AT_ONCE = 16


class _Answer(NamedTuple):
    mask: np.ndarray
    probability: np.ndarray
    presence: float | None


class Segmentation(_Answer):
    """What a `Segmenter` finds, at the image's own size and as the image is seen, upright: a tuple of three.

    Attributes:
        mask: (H, W) bool, what is named.
        probability: (H, W) float32 in [0, 1]; the mask is where it exceeds the model's threshold, one half mostly.
        presence: the probability that anything is named; None for a model that cannot say.
        present: whether anything is, a presence of at least one half; None likewise. No part of the tuple.
        reading: what the model could read of the expression; not `complete` where words are unknown to it, characters
            were dropped or the end was cut off. No part of the tuple.
    """

    reading: Reading | None = None

    @property
    def present(self) -> bool | None:
        return None if self.presence is None else self.presence >= 0.5


class Segmenter:
    """A model with its tokenizer: `segmenter(image, "the red circle")`.

    Args:
        model: a model of this package; moved to `device` and put into eval mode. Its `spec` says how images and
            expressions are prepared.
        tokenizer: turns expressions into what the model's text encoder was trained on.
        device: default: the device the model is on.
        dtype: "float32", "bfloat16" or "float16" for weights and features (sums, norms and softmaxes stay in
            float32, and so do the mask's resizing and its probabilities); default: what the model has.
        compile: torch.compile the model, on a GPU with CUDA graphs. Shapes are static: the canvas is a square anyway,
            and the number of expressions is filled up to 1, 2, 4, 8 or 16, each of which compiles at its first use (a
            minute or so). Pays where many images follow.
        fast: accelerate the model, in place, as `magnet_fast.accelerate(model)` does.
        pack: with `fast` on a CPU, keep packed copies of the weights, as `magnet_fast.accelerate(model, pack=True)`
            does: every image after the first is faster, for the memory of the weights once more. Also keep what the
            model has made of the last image before words come (RISAM, CRIS), for further sentences about it. False
            where a single image is asked about, or where weights are to be written through `.data`, which neither
            sees.
        stored_pixels: take the pixels as stored, as data sets do: EXIF orientation ignored, transparency dropped.
            Otherwise a picture is what a viewer shows: turned upright, its transparent parts on white.
        keep_masks: masks as the model draws them, also where it says that nothing is named. Otherwise they are empty
            there (weighed by the presence in models such as MagNet, see `models.Prediction`).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: ExpressionTokenizer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        fast: bool = True,
        pack: bool = False,
        stored_pixels: bool = False,
        keep_masks: bool = False,
    ) -> None:
        model = model if device is None else model.to(device)
        self.model = (model if dtype is None else in_precision(model, dtype)).eval()
        self.tokenizer, self.spec, self.fit = tokenizer, model.spec, open_fit(model.spec)
        self.device = next(model.parameters()).device
        if model.needs:
            raise ValueError(
                f"model: it needs {', '.join(model.needs)} beside image and expression, which none gives here"
            )
        if fast:
            accelerate(self.model, pack=pack and self.device.type == "cpu")
        self.compile, self.stored_pixels, self.keep_masks = compile, stored_pixels, keep_masks
        self._keep_image, self._last = pack, None
        if compile:
            # The forward pass alone: the mask's way back to each image's own size stays outside of the graph.
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.model.compile(fullgraph=True, dynamic=False, mode=mode)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
        tokenizer: str | os.PathLike | ExpressionTokenizer | None = None,
        image_size: int | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        fast: bool = True,
        pack: bool = True,
        stored_pixels: bool = False,
        keep_masks: bool = False,
    ) -> Segmenter:
        """Load a segmenter.

        Args:
            path: our `.safetensors` (a run's weights, or its `checkpoint.safetensors`), or a released `.pth`; None for
                the weights of the tiny model that ship with the package.
            device: default: the CPU.
            tokenizer: a `vocab.txt`, a folder with one or with a `tokenizer.json`, or a tokenizer. None takes the
                shipped vocabulary, where the checkpoint was trained on it. Released checkpoints need BERT's.
            image_size: side of the square that images are brought to; default: what the checkpoint was trained at.
            dtype: as in `Segmenter`; default: float32.
            compile, fast, pack, stored_pixels, keep_masks: as in `Segmenter`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a checkpoint of a model of this package, a vocabulary that is not the checkpoint's,
                or a dtype that does not run here.
        """
        loaded = checkpoints.load(path)
        model = loaded.model
        if image_size is not None:
            model.spec = model.spec._replace(size=image_size)
        chosen = loaded.tokenizer(tokenizer)
        return cls(
            model,
            chosen,
            device=device,
            dtype=dtype,
            compile=compile,
            fast=fast,
            pack=pack,
            stored_pixels=stored_pixels,
            keep_masks=keep_masks,
        )

    @overload
    def __call__(self, image: Picture, expression: str) -> Segmentation: ...

    @overload
    def __call__(self, image: Picture, expression: list[str]) -> list[Segmentation]: ...

    def __call__(self, image: Picture, expression: str | list[str]) -> Segmentation | list[Segmentation]:
        """Find what an expression names in an image.

        Args:
            image: a path, a PIL image, or an array (H, W, 3) RGB or (H, W), uint8 or uint16 (see
                `data.transforms.Picture`). A photo is turned upright by its EXIF orientation, unless `stored_pixels`:
                masks are of the picture as a viewer shows it, whose height and width may be swapped against those
                stored. `data.transforms.as_shown(image)` is that picture.
            expression: a sentence, or several about this image. What exceeds the tokenizer's length is cut
                off. A warning says once what the tokenizer could not read; `reading` says it of each.

        Returns:
            A `Segmentation`, or a list of them, in the order of the expressions.

        Raises:
            FileNotFoundError, ValueError, TypeError: the image cannot be read or has another layout; an
                expression is empty, not a string, or nothing of it is left to be read; the model answers NaN, naming
                the first such expression and the layer where it begins.
        """
        single = isinstance(expression, str)
        if not single and not isinstance(expression, list | tuple):
            given = type(expression).__name__
            raise TypeError(f"expression: expected a string or a list of strings, got {given}")
        expressions = [expression] if single else list(expression)
        if not all(isinstance(entry, str) for entry in expressions):
            given = ", ".join(sorted({type(entry).__name__ for entry in expressions}))
            raise TypeError(f"expression: expected a string or a list of strings, got a list with {given}")
        if not expressions:
            return []
        readings = self.tokenizer.readings(expressions)
        picture = as_rgb(image) if self.stored_pixels else as_shown(image)
        for text, reading in zip(expressions, readings, strict=True):
            self.tokenizer.tell(text, reading)
        pixels = self.fit.image(picture)[None].to(self.device)
        size = (picture.height, picture.width)
        found: list[Segmentation] = []
        with torch.inference_mode():
            seen = self._look(pixels)
            for start in range(0, len(expressions), _EXPRESSIONS_AT_ONCE):
                part = slice(start, start + _EXPRESSIONS_AT_ONCE)
                found += self._segment(pixels, seen, self.tokenizer.rows(readings[part]), size, expressions[part])
        for one, reading in zip(found, readings, strict=True):
            one.reading = reading
        return found[0] if single else found

    def _look(self, pixels: Tensor) -> list[Tensor] | None:
        """What the model makes of the image (1, 3, S, S) before words come; None where it makes nothing without them,
        or where something looks on or is compiled, which is then to see every sentence's call whole."""
        if self.compile or not getattr(self.model, "looks_first", False):
            return None
        parts = (self.model.image_encoder, self.model.fusion)
        if observed(self.model, *(module for part in parts for module in part.modules())):
            return None
        weights = [
            (tensor.data_ptr(), tensor.dtype, tensor._version)
            for part in parts
            for tensor in (*part.parameters(), *part.buffers())
        ]
        if self._last is None or self._last[0] != weights or not torch.equal(self._last[1], pixels):
            kept = (weights, pixels, self.model.look(pixels))
            self._last = kept if self._keep_image else None
            return kept[2]
        return self._last[2]

    def _segment(
        self,
        pixels: Tensor,
        seen: list[Tensor] | None,
        text: Text,
        size: tuple[int, int],
        expressions: list[str],
    ) -> list[Segmentation]:
        """One image (1, 3, S, S), what was seen of it, and N expressions."""
        count = len(text.ids)
        # Repeated expressions fill the batch up to one of the sizes that are compiled.
        rows = torch.arange(1 << (count - 1).bit_length() if self.compile else count) % count
        same = pixels.expand(len(rows), -1, -1, -1)
        more = {} if seen is None else {"seen": [one.expand(len(rows), *one.shape[1:]) for one in seen]}
        prediction = self.model(same, Text(*(part[rows].to(self.device) for part in text)), **more)
        if (nan := nan_answers(prediction)[:count].tolist()).count(True):
            first = nan.index(True)
            one = Text(*(part[first : first + 1].to(self.device) for part in text))
            raise ValueError(
                f"prediction: NaN in that of expression {shortened(expressions[first])}: "
                f"{where_nan_begins(self.model, pixels, one)}"
            )
        drawn = prediction._replace(presence=None) if self.keep_masks else prediction
        probability = self.fit.probability(drawn, size)[:count].float().cpu().numpy()
        presence: list[float | None] = [None] * count
        if prediction.presence is not None:
            presence = prediction.presence[:count].float().sigmoid().tolist()
        return [Segmentation(p > self.spec.threshold, p, named) for p, named in zip(probability, presence, strict=True)]


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
