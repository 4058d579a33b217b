"""The host that every system is made of, and the interfaces of its parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast.devices import on_cpu
from magnet_fast.models.base_weights import Base, base_of
from magnet_fast.models.config import InputConfig, ModelConfig
from magnet_fast.models.contract import Features, InputSpec, Prediction, Step, Text, Words, changed, probability


class ImageEncoder(nn.Module):
    """Images to maps, stage by stage. Maps are channels-last, (B, H, W, C).

    Attributes:
        channels: C of each stage's map.
        strides: pixels of the image a pixel of each map. Maps round up what a stride does not divide, and strides may
            repeat: who reads maps takes their sizes from the maps.
        in_stream: whether what goes into `descend` reaches the next stage. False for an encoder that makes all its
            maps at once: words then meet its maps, not the encoder itself.
        resized: names of parameters that `load_pretrained` made by interpolation.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    in_stream = True
    resized: frozenset[str] = frozenset()

    def start(self, image: Tensor) -> Any:
        """(B, 3, H, W) to the stream that stage 0 takes."""
        raise NotImplementedError

    def stage(self, i: int, stream: Any) -> Tensor:
        """The map of stage i, (B, H, W, C)."""
        raise NotImplementedError

    def descend(self, i: int, stream: Tensor) -> Any:
        """From stage i's map, as the fusion left it, to the stream that stage i + 1 takes. Not after the last stage."""
        return stream

    def load_pretrained(self, source: str | None) -> None:
        """Load published weights: of this name or path, or, for None, those of this size.

        The same name gives the same weights again: files of what was trained rely on it.

        Raises:
            ValueError: there are none, they cannot be had, or they do not fit.
        """
        raise ValueError(f"pretrained: {type(self).__name__} has no published weights; build with pretrained=False")


class TextEncoder(nn.Module):
    """Expressions to words, whole or in slices beside the image's stages.

    Attributes:
        width: D, channels of a word.
        vocab_size: entries of the word embedding.
        max_positions: the most tokens an expression may have.
        resized: as of an `ImageEncoder`.
    """

    width: int
    vocab_size: int
    max_positions: int
    resized: frozenset[str] = frozenset()

    @property
    def word_embedding(self) -> Tensor:
        """(V, D): the vectors that ids stand for; Mask Grounding's predictor is tied to them."""
        raise NotImplementedError

    @property
    def sentence_width(self) -> int:
        """Channels of `Words.sentence`."""
        return self.width

    def start(self, text: Text, embedded: Tensor | None = None) -> Words:
        """What stands before the first stage: embeddings, or, encoded whole, everything.

        Args:
            text: the expressions.
            embedded: (B, T, D), vectors to take in place of those that the ids stand for.
        """
        raise NotImplementedError

    def advance(self, i: int, words: Words) -> Words:
        """The slice beside stage i; nothing where the text is encoded whole."""
        return words

    def load_pretrained(self, source: str | None) -> None:
        """As `ImageEncoder.load_pretrained`."""
        raise ValueError(f"pretrained: {type(self).__name__} has no published weights; build with pretrained=False")


class Fusion(nn.Module):
    """Brings words and pixels together: one instance a model, its modules of the stages inside.

    A stage that is skipped has no module, and the last one no gate into the stream: nothing reads it there, and
    processes that train together wait for every gradient.

    Attributes:
        needs: names of tensors of the context that it reads: a data set must offer them.
        optional: those of `needs` without which it still answers, so that an image and a sentence alone will do.
    """

    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def start(self, maps_of: Callable[[Tensor], list[Tensor]], context: Mapping[str, Tensor]) -> Any:
        """What it hands itself at the first stage, the first `carry`: nothing unless said.

        Args:
            maps_of: what the image encoder alone makes of other images, `ReferringModel.maps`.
            context: as of `forward`.
        """
        return None

    def forward(self, i: int, x: Tensor, words: Words, carry: Any, context: Mapping[str, Tensor]) -> Step:
        """x (B, H, W, C) of stage i and the words to the output for the head and the stream for the next stage."""
        raise NotImplementedError


class LateFusion(Fusion):
    """Words come in after the last stage: what becomes of an image before is the same for every sentence about it.

    Attributes:
        stages: maps of the image encoder.
    """

    stages: int

    def look(self, maps: list[Tensor]) -> list[Tensor]:
        """What is made of the maps, (B, H, W, C) each, before words come."""
        return maps

    def join(self, seen: list[Tensor], words: Words, context: Mapping[str, Tensor]) -> Step:
        """What `look` gave, and the words, to the one output for the head; the step's stream is not read."""
        raise NotImplementedError

    def forward(self, i: int, x: Tensor, words: Words, carry: list[Tensor] | None, context: Mapping) -> Step:
        maps = [*(carry or ()), x]
        if len(maps) < self.stages:
            return Step(None, x, words, carry=maps)
        return self.join(self.look(maps), words, context)


class Head(nn.Module):
    """Neck and decoder: everything from the stages' outputs to masks.

    Attributes:
        pixel_channels: C of `Prediction.pixels`; None for a head that gives none.
        sentence_width: channels of the sentence of `Prediction.words`; None where they are the text encoder's words.
        says_presence: whether `Prediction.presence` is set, as its configuration says.
        needs: names of tensors of the context that it reads.
    """

    pixel_channels: int | None = None
    sentence_width: int | None = None
    says_presence = False

    def forward(self, features: Features) -> Prediction:
        raise NotImplementedError


class Presence(nn.Module):
    """Is anything named here? For models whose head does not say. forward returns logits (B,)."""

    def forward(self, features: Features, prediction: Prediction) -> Tensor:
        raise NotImplementedError


class ReferringModel(nn.Module):
    """An image and an expression in, a `Prediction` out; every system is this host with its own parts.

    Args:
        config: which parts; `models.create` makes one by name.

    Attributes:
        image_encoder, text_encoder, fusion, head, presence: the parts, by name; presence may be None.
        bases: what the encoders were loaded with, by "image" and "text".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.bases: dict[str, Base] = {}
        image, text = config.image, config.text
        shapes = config.shapes
        self.image_encoder: ImageEncoder = image.build()
        self.text_encoder: TextEncoder = text.build()
        self.fusion: Fusion = config.fusion.build(image, text)
        self.head: Head = config.head.build(shapes)
        self.presence: Presence | None = None
        if config.presence is not None:
            self.presence = config.presence.build(shapes._replace(pixels=config.head.pixel_channels(shapes)))

    def forward(
        self,
        image: Tensor,
        text: Text,
        context: Mapping[str, Tensor] | None = None,
        *,
        seen: list[Tensor] | None = None,
    ) -> Prediction:
        """Predict masks.

        Args:
            image: (B, 3, H, W) float, prepared as `spec` says. H and W are free: what strides do not divide is padded
                inside.
            text: of the same batch.
            context: the named tensors that the parts read, see `needs` and `required`.
            seen: what `look` has made of these images: sentences about one image then share it.
        """
        features = self.encode(image, text, context, seen=seen)
        prediction = self.head(features)
        if self.presence is not None:
            prediction = changed(prediction, presence=self.presence(features, prediction))
        return prediction

    def encode(
        self,
        image: Tensor,
        text: Text,
        context: Mapping[str, Tensor] | None = None,
        *,
        embedded: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Features:
        """What heads and training terms read: image and text encoded, and fused stage by stage.

        Args:
            image, text, context, seen: as for `forward`.
            embedded: (B, T, D), vectors to take in place of those that `text.ids` stand for: some words' are hidden.
        """
        self._check(image, text, context)
        given = (text,) if embedded is None else (text, embedded)
        words = self.text_encoder.start(*given)
        maps, tokens = [], []
        stages, size = len(self.image_encoder.channels), (image.shape[2], image.shape[3])
        if seen is not None:
            for i in range(stages):
                words = self.text_encoder.advance(i, words)
            step = self._late_fusion().join(seen, words, context or {})
            return Features([step.output], words, [step.tokens], size)
        carry = self.fusion.start(self.maps, context or {})
        stream = self._start(image)
        for i in range(stages):
            x = self.image_encoder.stage(i, stream)
            words = self.text_encoder.advance(i, words)
            step = self.fusion(i, x, words, carry, context or {})
            words, carry = step.words, step.carry
            if step.output is not None:
                maps.append(step.output)
                tokens.append(step.tokens)
            if i + 1 < stages and self.image_encoder.in_stream:
                stream = self.image_encoder.descend(i, step.stream)
        return Features(maps, words, tokens, size)

    def look(self, image: Tensor) -> list[Tensor]:
        """What becomes of images (B, 3, H, W) before words come, for `seen`; for models that look first.

        Raises:
            TypeError: words enter this model's image encoder.
        """
        fusion = self._late_fusion()
        return fusion.look(self.maps(image))

    def maps(self, image: Tensor) -> list[Tensor]:
        """What the image encoder alone makes of images (B, 3, H, W): the map of each stage, (B, Hᵢ, Wᵢ, Cᵢ)."""
        stages, stream, maps = len(self.image_encoder.channels), self._start(image), []
        for i in range(stages):
            maps.append(self.image_encoder.stage(i, stream))
            if i + 1 < stages and self.image_encoder.in_stream:
                stream = self.image_encoder.descend(i, maps[-1])
        return maps

    @property
    def looks_first(self) -> bool:
        """Whether words come in after the image encoder alone, so that sentences about an image can share `look`."""
        return isinstance(self.fusion, LateFusion)

    def _late_fusion(self) -> LateFusion:
        if not isinstance(self.fusion, LateFusion):
            raise TypeError(
                f"seen: words enter this model's image encoder, by a {type(self.fusion).__name__}; an image alone is "
                "nothing to it"
            )
        return self.fusion

    def _start(self, image: Tensor) -> Any:
        return self.image_encoder.start(image.to(next(self.image_encoder.parameters()).dtype))

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        size: tuple[int, int] | None = None,
        context: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The probability (B, H, W) float32 that a pixel belongs to what is named; the short form of a call.

        Args:
            image: (B, 3, H, W) float, prepared as `spec` says.
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 or True for a token that is read.
            size: (H, W) of the result; default: the image's.
            context: as for `forward`.
        """
        prediction = self(image, Text(input_ids, attention_mask.bool()), context)
        return probability(prediction, size or (image.shape[2], image.shape[3]))

    @property
    def spec(self) -> InputSpec:
        """How images and expressions are prepared. It is stored with the weights; assign another to change it."""
        return self.config.spec

    @spec.setter
    def spec(self, spec: InputSpec) -> None:
        self.config = self.config.model_copy(update={"input": InputConfig(**spec._asdict())})

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tensors of the context that the fusion reads: what a data set must offer."""
        return self.fusion.needs

    @property
    def required(self) -> tuple[str, ...]:
        """Those of `needs` without which no forward pass runs."""
        return tuple(name for name in self.needs if name not in self.fusion.optional)

    def repeated_layers(self) -> list[nn.Module]:
        """The layers that hold nearly all activations and weights: units of activation checkpointing and of FSDP.

        They are the modules with `is_repeated_layer`, and what the text encoder, which may be another library's, keeps
        in lists. No layer is inside another.
        """
        marked = [module for module in self.modules() if getattr(module, "is_repeated_layer", False)]
        return list(dict.fromkeys([*marked, *_listed(self.text_encoder)]))

    def load_pretrained(self, sources: Mapping[str, str | bool]) -> None:
        """Load published weights into the encoders.

        Args:
            sources: "image" and "text", each a name or path; True or absent takes the published ones of the encoder's
                size, False leaves it as it is.

        Raises:
            ValueError: an unknown entry, or weights that cannot be had or do not fit.
        """
        encoders = {"image": self.image_encoder, "text": self.text_encoder}
        unknown = sorted(set(sources) - set(encoders))
        if unknown:
            raise ValueError(f"pretrained has the unknown entry {unknown[0]!r}; known: 'image', 'text'")
        for name, encoder in encoders.items():
            source = sources.get(name, True)
            if source is not False:
                with on_cpu():  # where the published weights are made, to be copied into these
                    encoder.load_pretrained(None if source is True else source)
                self.bases[name] = base_of(encoder, source)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **where: Any) -> ReferringModel:
        """As `models.from_pretrained`; ValueError, too, for a model of another class than this one."""
        model = _hub().from_pretrained(source, **where)
        if not isinstance(model, cls):
            raise ValueError(f"source: expected a {cls.__name__}, got {source!r}, a {type(model).__name__}")
        return model

    def save_pretrained(self, folder: str | os.PathLike[str], **contents: Any) -> None:
        """As `models.hub.save_pretrained`."""
        _hub().save_pretrained(self, folder, **contents)

    def push_to_hub(self, repository: str, **contents: Any) -> str:
        """As `models.hub.push_to_hub`."""
        return _hub().push_to_hub(self, repository, **contents)

    def _check(self, image: Tensor, text: Text, context: Mapping[str, Tensor] | None) -> None:
        """Raise TypeError or ValueError naming what does not fit (B, 3, H, W), (B, T) and (B, T).

        Only shapes and dtypes are looked at: values would cost a synchronisation on a GPU.
        """
        if not image.is_floating_point():
            raise TypeError(f"image must be a floating-point tensor, normalised; got {image.dtype}")
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"image must be (B, 3, H, W) with no empty dimension; got {tuple(image.shape)}")
        if not isinstance(text, Text):
            raise TypeError(f"text must be a models.Text(ids, mask); got {type(text).__name__}")
        ids, mask = text
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"text.ids must be int64 or int32; got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[0] != image.shape[0] or ids.shape[1] == 0:
            raise ValueError(f"text.ids must be (B, T), B that of the image, {image.shape[0]}; got {tuple(ids.shape)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"text.mask must be bool, True for a token that is read; got {mask.dtype}")
        if mask.shape != ids.shape:
            raise ValueError(f"text.mask must have the shape of text.ids, {tuple(ids.shape)}; got {tuple(mask.shape)}")
        if ids.shape[1] > self.text_encoder.max_positions:
            raise ValueError(
                f"text.ids holds {ids.shape[1]} tokens; this encoder has {self.text_encoder.max_positions} positions"
            )
        missing = [name for name in self.required if name not in (context or {})]
        if missing:
            raise ValueError(f"context lacks {', '.join(missing)}, which this model needs")


def _hub() -> ModuleType:
    from magnet_fast.models import hub  # which reads and writes models, and so stands on this module

    return hub


def _listed(module: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of modules inside a module."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _listed(child)]
