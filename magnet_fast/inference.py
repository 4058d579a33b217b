"""Segment what an expression names: from a checkpoint and an image to a mask at the image's own size."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from magnet_fast import checkpoints, editing
from magnet_fast.data.context import makers_of, on_canvas
from magnet_fast.data.tokenizers import ExpressionTokenizer, Reading, shortened
from magnet_fast.data.transforms import Picture, as_rgb, as_shown, open_fit
from magnet_fast.evaluation.finite import nan_answers, where_nan_begins
from magnet_fast.fast import accelerate
from magnet_fast.models.contract import Text, check_side
from magnet_fast.ops._observed import observed

INT8 = "int8"
PRECISIONS = ("float32", "bfloat16", "float16", INT8)
BATCH_SIZE = 16
"""Sentences in one forward pass, unless said."""


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


@dataclass(frozen=True, eq=False)
class Prepared:
    """A picture as a segmenter's model reads it, which may stand in the picture's place; `Segmenter.prepare` makes it.

    Attributes:
        pixels: (3, S, S) float32.
        size: (H, W) of the picture, to which masks come back.
        context: tensors beside the picture that the model reads, by name: made of it, or given to `prepare`.
    """

    pixels: Tensor
    size: tuple[int, int]
    context: dict[str, Tensor] = field(default_factory=dict)


class Segmenter:
    """A model with its tokenizer: `segmenter(image, "the red circle")`.

    Args:
        model: a model of this package; moved to `device` and put into eval mode. Its `spec` says how images and
            expressions are prepared.
        tokenizer: turns expressions into what the model's text encoder was trained on.
        device: default: the device the model is on.
        dtype: "float32", "bfloat16" or "float16" for weights and features (sums, norms and softmaxes stay in
            float32, and so do the mask's resizing and its probabilities); or "int8", on a CPU: float32, packed, with
            products in int8, as `magnet_fast.accelerate(weights="int8")` has them; default: what the model has.
        compile: torch.compile the model, on a GPU with CUDA graphs. Shapes are static: the canvas is a square anyway,
            and the number of expressions is filled up to a power of two, each of which compiles at its first use (a
            minute or so; on a CPU minutes, by a C++ compiler). Pays where many images follow, for small models most.
            Where there is no such compiler a warning says so, and the model runs uncompiled.
        fast: accelerate the model, in place, as `magnet_fast.accelerate(model)` does.
        pack: with `fast` on a CPU, keep packed copies of the weights, as `magnet_fast.accelerate(model, pack=True)`
            does: every image after the first is faster, for the memory of the weights once more. Also keep what the
            model has made of the last image (of the last batch's images) before words come (RISAM, CRIS), for further
            sentences about it. False where a single image is asked about, or where weights are to be written through
            `.data`, which neither sees.
        stored_pixels: take the pixels as stored, as data sets do: EXIF orientation ignored, transparency dropped.
            Otherwise a picture is what a viewer shows: turned upright, its transparent parts on white.
        keep_masks: masks as the model draws them, also where it says that nothing is named. Otherwise they are empty
            there (weighed by the presence in models such as MagNet, see `models.Prediction`).
        batch_size: sentences in one forward pass, about one image or several.

    Attributes:
        lacking: names of tensors that the model needs beside a picture and that are not made of it (`proposals`): it is
            asked about what `prepare` made of picture and tensors.
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
        batch_size: int = BATCH_SIZE,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size!r}")
        self._makers = makers_of(model.needs)
        self.lacking = tuple(name for name in model.required if name not in self._makers)
        model = model if device is None else model.to(device)
        pack = pack or dtype == INT8
        self.model = prepared_model(model, dtype, fast=fast, pack=pack).eval()
        self.tokenizer, self.spec, self.fit = tokenizer, model.spec, open_fit(model.spec)
        self.device = next(model.parameters()).device
        if compile and self.device.type == "cpu" and (lacking := _lacking_compiler()) is not None:
            warnings.warn(f"compile: no C++ compiler {lacking} here; the model runs uncompiled", stacklevel=2)
            compile = False
        self.compile, self.stored_pixels, self.keep_masks = compile, stored_pixels, keep_masks
        self.batch_size = batch_size
        self._keep_image, self._last = pack, None
        if compile:
            # The forward pass alone: the mask's way back to each image's own size stays outside of the graph.
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.model.compile(fullgraph=True, dynamic=False, mode=mode)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike | checkpoints.Checkpoint | None = None,
        device: torch.device | str | None = None,
        tokenizer: str | os.PathLike | ExpressionTokenizer | None = None,
        image_size: int | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        fast: bool = True,
        pack: bool = True,
        stored_pixels: bool = False,
        keep_masks: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> Segmenter:
        """Load a segmenter.

        Args:
            path: what `checkpoints.load` reads: our `.safetensors` (a run's weights, or its
                `checkpoint.safetensors`), a released `.pth`, "hub:owner/name", …; or what it has read; None for the
                weights of the tiny model that ship with the package.
            device: default: the CPU.
            tokenizer: a `vocab.txt`, a folder with one or with a `tokenizer.json`, or a tokenizer. None takes the
                shipped vocabulary, where the checkpoint was trained on it. Released checkpoints need BERT's.
            image_size: side of the square that images are brought to, 8 to 4096; default: what the checkpoint was
                trained at.
            dtype: as in `Segmenter`; default: float32.
            compile, fast, pack, stored_pixels, keep_masks, batch_size: as in `Segmenter`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an image size out of bounds; not a checkpoint of a model of this package, a vocabulary that is
                not the checkpoint's, or a dtype that does not run here.
        """
        if image_size is not None:
            check_side(image_size, "image_size")
        loaded = path if isinstance(path, checkpoints.Checkpoint) else checkpoints.load(path)
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
            batch_size=batch_size,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Segmenter:
        """Load a segmenter from the hub, or from a folder that `save_pretrained` wrote. Nothing in either is executed.

        Args:
            source: "owner/name", or the folder.
            revision: a branch, tag or commit of the repository; None for its main branch.
            token: of the hub, for private repositories; None for the one that `hf auth login` keeps, False for none.
            cache_dir: None for the hub's own, which `HF_HOME` names.
            local_files_only: take what the cache holds, without network, as with `HF_HUB_OFFLINE=1`.
            **options: as in `from_checkpoint`.

        Raises:
            ValueError: no such name, repository, revision or file; no network and nothing in the cache; a model that is
                none of this package; or as `from_checkpoint`.
        """
        loaded = checkpoints.load_pretrained(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return cls.from_checkpoint(loaded, **options)

    @overload
    def __call__(self, image: Picture | Prepared, expression: str) -> Segmentation: ...

    @overload
    def __call__(self, image: Picture | Prepared, expression: list[str]) -> list[Segmentation]: ...

    @overload
    def __call__(self, image: list[Picture | Prepared], expression: str | list[str]) -> list[Segmentation]: ...

    def __call__(
        self, image: Picture | Prepared | list[Picture | Prepared], expression: str | list[str]
    ) -> Segmentation | list[Segmentation]:
        """Find what an expression names in an image.

        Args:
            image: a path, a PIL image, or an array (H, W, 3) RGB or (H, W), uint8 or uint16 (see
                `data.transforms.Picture`). A photo is turned upright by its EXIF orientation, unless `stored_pixels`:
                masks are of the picture as a viewer shows it, whose height and width may be swapped against those
                stored. `data.transforms.as_shown(image)` is that picture. Or what `prepare` makes of one. Or a list of
                these, of any sizes; they are read batch by batch, and one that stands several times in a batch, as the
                same object or path, is read once.
            expression: a sentence, or several about this image; for a list of images one for each, or one for all. What
                exceeds the tokenizer's length is cut off. A warning says once what the tokenizer could not read;
                `reading` says it of each.

        Returns:
            A `Segmentation`, or where there is a list a list of them, in its order.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read or has another layout; an
                expression is empty, not a string, or nothing of it is left to be read; there are not as many of them as
                images; the model answers NaN, naming the first such expression and the layer where it begins.
        """
        several = isinstance(image, list | tuple)
        single = isinstance(expression, str)
        if not single and not isinstance(expression, list | tuple):
            given = type(expression).__name__
            raise TypeError(f"expression: expected a string or a list of strings, got {given}")
        expressions = [expression] * (len(image) if several else 1) if single else list(expression)
        images = list(image) if several else [image] * len(expressions)
        if not all(isinstance(entry, str) for entry in expressions):
            given = ", ".join(sorted({type(entry).__name__ for entry in expressions}))
            raise TypeError(f"expression: expected a string or a list of strings, got a list with {given}")
        if len(images) != len(expressions):
            raise ValueError(f"expression: expected one for each of {len(images)} images, got {len(expressions)}")
        readings = self.tokenizer.readings(expressions)
        found: list[Segmentation] = []
        ready: dict[Any, Prepared] = {}
        looked: list[Any] = []
        with torch.inference_mode():
            for start in range(0, len(expressions), self.batch_size):
                part = slice(start, start + self.batch_size)
                keys = [os.fspath(one) if isinstance(one, str | os.PathLike) else id(one) for one in images[part]]
                kept, ready = ready, {}
                for position, key in enumerate(keys, start):
                    if key not in ready:
                        ready[key] = kept.get(key) or self._read(images[position], f"image[{position}]: " * several)
                for text, reading in zip(expressions[part], readings[part], strict=True):
                    self.tokenizer.tell(text, reading)
                if list(ready) != looked:
                    pixels = torch.stack([one.pixels for one in ready.values()]).to(self.device)
                    context = self._context(list(ready.values()))
                    seen, looked = self._look(pixels), list(ready)
                asked = _Asked(
                    torch.tensor([looked.index(key) for key in keys], device="cpu"),
                    self.tokenizer.rows(readings[part]),
                    [ready[key].size for key in keys],
                    expressions[part],
                )
                found += self._segment(pixels, context, seen, asked)
        for one, reading in zip(found, readings, strict=True):
            one.reading = reading
        return found[0] if single and not several else found

    def edit(
        self, image: Picture, expression: str, operation: str | editing.Operation, *, feather: int = 0
    ) -> Image.Image:
        """Edit what an expression names, and nothing else: `segmenter.edit(photo, "the red car", "colour=#2060ff")`.

        Args:
            image, expression: as for a call.
            operation: "colour=#ff0000", "blur", "grey", "brightness=1.4", "cut-out" or "background=FILE"; or any
                function of an array (H, W, 3) uint8 that returns one; see `editing`.
            feather: pixels over which it sets in, inside the mask.

        Returns:
            The picture as a viewer shows it (as stored with `stored_pixels`), RGB, or RGBA after "cut-out". Where the
            mask is not it is the picture, bit by bit; where nothing is found it is so everywhere.

        Raises:
            FileNotFoundError, ValueError, TypeError: as a call does; an operation that is none, or one that returns
                no picture of this size.
        """
        operation = editing.find(operation)
        picture = self._picture(image)
        return editing.edited(picture, self(picture, expression).mask, operation, feather)

    def prepare(self, image: Picture, context: Mapping[str, Tensor] | None = None) -> Prepared:
        """Read a picture as the model takes it. Any thread may do so, ahead of the call that it is given to.

        Args:
            image: as for a call.
            context: tensors that the model reads beside the picture, without a batch's dimension, as a data set's
                samples carry them in `extra`. They come before what would be made of the picture.

        Raises:
            FileNotFoundError, ValueError, TypeError: it cannot be read, or has another layout; the model reads no such
                tensor, or lacks one.
        """
        given = dict(context or {})
        if unread := sorted(given.keys() - set(self.model.needs)):
            reads = ", ".join(self.model.needs) or "nothing"
            raise ValueError(f"context: expected what the model reads beside the picture, {reads}; got {unread[0]!r}")
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"context[{name!r}] is a {type(tensor).__name__}; expected a tensor")
        if missing := [name for name in self.lacking if name not in given]:
            named = ", ".join(missing)
            raise ValueError(
                f"context: the model needs {named} beside the picture; give prepare(picture, context={{…}})"
            )
        picture = self._picture(image)
        pixels = self.fit.pixels(picture)
        for name, maker in self._makers.items():
            if name not in given:
                given[name] = torch.from_numpy(on_canvas(maker, pixels, self.spec.size))
        return Prepared(self.fit.normalise(pixels), (picture.height, picture.width), given)

    def _context(self, prepared: list[Prepared]) -> dict[str, Tensor]:
        """What stands beside pictures of one batch, stacked."""
        shapes = [{name: tuple(tensor.shape) for name, tensor in one.context.items()} for one in prepared]
        other = next((one for one in shapes if one != shapes[0]), None)
        if other is not None:
            raise ValueError(
                f"image: expected the same tensors beside all pictures of a batch, got {shapes[0]} and {other}; ask "
                "about each alone, or with batch_size=1"
            )
        return {name: torch.stack([one.context[name] for one in prepared]).to(self.device) for name in shapes[0]}

    def _picture(self, image: Picture) -> Image.Image:
        return as_rgb(image) if self.stored_pixels else as_shown(image)

    def _read(self, image: Picture | Prepared, where: str) -> Prepared:
        """`prepare`, or nothing to do; a message begins with `where`."""
        try:
            return image if isinstance(image, Prepared) else self.prepare(image)
        except (FileNotFoundError, TypeError, ValueError) as error:
            if not where:
                raise
            kind = next(one for one in (FileNotFoundError, TypeError, ValueError) if isinstance(error, one))
            raise kind(f"{where}{error}") from error

    def _look(self, pixels: Tensor) -> list[Tensor] | None:
        """What the model makes of images (U, 3, S, S) before words come; None where it makes nothing without them,
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
        self, pixels: Tensor, context: dict[str, Tensor], seen: list[Tensor] | None, asked: _Asked
    ) -> list[Segmentation]:
        """Images (U, 3, S, S), what stands beside them and what was seen of them, and N expressions about them."""
        text, count = asked.text, len(asked.which)
        # Repeated expressions fill the batch up to one of the sizes that are compiled.
        rows = torch.arange(1 << (count - 1).bit_length() if self.compile else count, device="cpu") % count
        which = asked.which[rows]
        more: dict[str, Any] = {} if seen is None else {"seen": [_of_rows(one, which) for one in seen]}
        text = Text(*(part[rows].to(self.device) for part in text))
        if context:
            more["context"] = {name: _of_rows(one, which) for name, one in context.items()}
        prediction = self.model(_of_rows(pixels, which), text, **more)
        if (nan := nan_answers(prediction)[:count].tolist()).count(True):
            first = nan.index(True)
            one = Text(*(part[first : first + 1] for part in text))
            beside = {name: tensor[first : first + 1] for name, tensor in more.get("context", {}).items()}
            raise ValueError(
                f"prediction: NaN in that of expression {shortened(asked.expressions[first])}: "
                f"{where_nan_begins(self.model, pixels[which[first]][None], one, beside)}"
            )
        presence: list[float | None] = [None] * count
        if prediction.presence is not None:
            presence = prediction.presence[:count].float().sigmoid().tolist()
        drawn = prediction._replace(presence=None) if self.keep_masks else prediction
        found = []
        for size, same in groupby(range(count), key=asked.sizes.__getitem__):
            own = list(same)
            part = slice(own[0], own[-1] + 1)
            gate = None if drawn.presence is None else drawn.presence[part]
            of_size = drawn._replace(mask=drawn.mask[part], presence=gate)
            probability = self.fit.probability(of_size, size).float().cpu().numpy()
            pairs = zip(probability, presence[part], strict=True)
            found += [Segmentation(p > self.spec.threshold, p, named) for p, named in pairs]
        return found


class _Asked(NamedTuple):
    """N expressions of a batch: the image, the tokens, the picture's size and the text of each."""

    which: Tensor
    text: Text
    sizes: list[tuple[int, int]]
    expressions: list[str]


def _of_rows(images: Tensor, which: Tensor) -> Tensor:
    """(U, ...) to (N, ...). One image is not copied: layers see that it is the same in all rows."""
    return images.expand(len(which), *images.shape[1:]) if len(images) == 1 else images[which]


def prepared_model(model: nn.Module, dtype: torch.dtype | str | None, *, fast: bool, pack: bool) -> nn.Module:
    """The model itself, in a precision and accelerated.

    Args:
        model: on its device.
        dtype: as in `Segmenter`; None leaves the weights as they are.
        fast: accelerate it.
        pack: keep packed copies of the weights where they are on a CPU; "int8" does in any case.

    Raises:
        ValueError: no such dtype, or one that does not run on the model's device, or int8 without `fast`.
    """
    int8 = dtype == INT8
    if int8 and not fast:
        raise ValueError("fast: expected True with dtype int8, which is a part of it, got False")
    if dtype is not None:
        model = in_precision(model, dtype)
    if fast:
        on_cpu = next(model.parameters()).device.type == "cpu"
        accelerate(model, pack=on_cpu and (pack or int8), weights=INT8 if int8 else "same")
    return model


def _lacking_compiler() -> str | None:
    """The command that torch.compile would call to compile for a CPU, where there is none; None where there is."""
    command = os.environ.get("CXX", "g++")
    return None if shutil.which(command) else repr(command)


def in_precision(model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
    """The model with weights of a dtype, itself: inference in low precision without autocast's casts. "int8" is float32
    here, for `accelerate` to go on with.

    Autocast would cast weights at every call and take norms and softmaxes in float32 through memory; the operators and
    PyTorch's norms keep float32 inside either way, and the masks agree as well (see the tests).

    Raises:
        ValueError: no such dtype, or one that does not run on the model's device.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise ValueError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {name!r}")
    device = next(model.parameters()).device
    if name == INT8 and device.type != "cpu":
        raise ValueError(f"dtype: int8 is for CPUs, got a model on {device}; take bfloat16 or float16")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype: float16 is for GPUs (a CPU computes it slower than float32); take bfloat16")
    return model.to(torch.float32 if name == INT8 else getattr(torch, name))
