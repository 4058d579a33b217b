"""What models take and return: the one contract between data, models, losses and scores.

Nothing here knows a model. Tensors between parts are channels-last, (B, H, W, C).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import _register_namedtuple


class Text(NamedTuple):
    """A batch of tokenised expressions.

    Attributes:
        ids: (B, T) int64.
        mask: (B, T) bool, True for a token that is read, False for padding.
    """

    ids: Tensor
    mask: Tensor


class Words(NamedTuple):
    """Features of a batch of expressions.

    Attributes:
        features: (B, T, D).
        mask: (B, T) bool, True for a token that is read.
        pooled: (B, D) what the encoder itself says of the whole sentence; None where it says nothing.
    """

    features: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    @property
    def sentence(self) -> Tensor:
        """(B, D): `pooled`, else the mean of the words that are read."""
        if self.pooled is not None:
            return self.pooled
        keep = self.mask[..., None].to(self.features.dtype)
        return (self.features * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)


class Step(NamedTuple):
    """What a fusion makes of one stage.

    Attributes:
        output: (B, H, W, C) for the head; None at a stage that gives it nothing.
        stream: (B, H, W, C) for the next stage.
        words: the words that go on.
        tokens: (B, N, C) for heads that read tokens; None for a fusion without.
        carry: what the fusion hands to itself at the next stage.
    """

    output: Tensor | None
    stream: Tensor
    words: Words
    tokens: Tensor | None = None
    carry: Any = None


class Features(NamedTuple):
    """What the encoders and the fusion make of a batch: all that a head, or a training term, reads.

    Attributes:
        maps: (B, Hᵢ, Wᵢ, Cᵢ), one of each stage unless the fusion joins stages, in the order of the encoder's strides.
        words: after the last stage.
        tokens: beside each map; None where the fusion has none.
        size: (H, W) of the image that went in.
    """

    maps: list[Tensor]
    words: Words
    tokens: list[Tensor | None]
    size: tuple[int, int]


class Prediction(NamedTuple):
    """What every model returns; nobody looks at shapes to know which model it was.

    Attributes:
        mask: (B, h, w) logits; sigmoid is the probability that a pixel belongs to what is named. A model with a logit
            for the background, too, gives the difference, target minus background: that is exact.
        presence: (B,) logits; sigmoid is the probability that anything is named. None: this model cannot say.
        earlier: predictions of earlier layers, first to last, for deep supervision.
        pixels: (B, C, h, w) embedding of the pixels, for training terms; None for a model without.
        words: those that `pixels` are aligned with, after the encoders, or the tokens that a fusion makes of them; None
            for a model without.
        extra: what only this system has (a minimap, roles, instances), for its own terms and pictures.
        presence_weighs: how `probability` reads `presence`. False: below one half it empties the mask. True: it is a
            factor, the class of the one query, as Mask2Former and MagNet multiply them.
        aligned_corners: how mask logits are resized: with aligned corners, as LAVT and its kin, or without.
    """

    mask: Tensor
    presence: Tensor | None = None
    earlier: tuple[Prediction, ...] = ()
    pixels: Tensor | None = None
    words: Words | None = None
    extra: dict[str, Tensor] = {}  # noqa: RUF012 (never written to)
    presence_weighs: bool = False
    aligned_corners: bool = True


class InputSpec(NamedTuple):
    """How pictures and expressions are prepared for a model; stored with every checkpoint.

    Attributes:
        size: side of the square that images are brought to, in pixels.
        fit: "squash" (aspect ratio not kept), "letterbox" (kept, centred, borders around) or "longest" (the longest
            side becomes `size`, padded at the right and at the bottom).
        mean, std: of the channels red, green, blue, for values from 0 to 1.
        tokenizer: "wordpiece" (BERT's), "clip" (CLIP's byte pairs), or name or folder of a transformers tokenizer.
        max_tokens: T, the special tokens included; what is longer is cut.
        threshold: a pixel belongs to what is named where its probability exceeds this.
    """

    size: int = 480
    fit: Literal["squash", "letterbox", "longest"] = "squash"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    tokenizer: str = "wordpiece"
    max_tokens: int = 20
    threshold: float = 0.5


_Record = TypeVar("_Record", Words, Prediction)


def changed(record: _Record, **fields: Any) -> _Record:
    """`record._replace(**fields)` for what a model returns: torch.compile of torch 2.11 cannot return a record made by
    that in the graph itself."""
    return type(record)(**{**record._asdict(), **fields})


MAX_INPUT_SIDE = 4096
"""The largest side of the square that images are brought to, four times SAM's and eight times the others'.

There the widest layer of Swin-B holds 2 GiB a picture (1024 x 1024 places, 512 channels, float32), and several such are
alive at once; at twice the side it is 8 GiB. More is a slip of the pen, and would end as memory that runs out [our
choice]."""


def check_side(size: object, name: str, least: int = 8) -> None:
    """TypeError or ValueError for what is no side, in pixels, from `least` to `MAX_INPUT_SIDE`."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} is {size!r}; expected an int")
    if not least <= size <= MAX_INPUT_SIDE:
        raise ValueError(f"{name} is {size}; expected {least} to {MAX_INPUT_SIDE} pixels")


# So that `torch.export.save` can write a program that takes and returns them, and `load` reads it safely.
for _contract in (Text, Words, Prediction):
    _register_namedtuple(_contract, serialized_type_name=f"magnet_fast.models.{_contract.__name__}")
torch.serialization.add_safe_globals([Text, Words, Prediction])


def probability(prediction: Prediction, size: tuple[int, int]) -> Tensor:
    """The probability that a pixel belongs to what is named: (B, H, W) float32 at `size`.

    The one decision: mask logits resized bilinearly (see `Prediction.aligned_corners`), then a sigmoid, then the
    presence (see `Prediction.presence_weighs`).
    """
    mask = resized(prediction._replace(mask=_finite(prediction.mask)), size).sigmoid()
    if prediction.presence is None:
        return mask
    presence = _finite(prediction.presence)
    if not prediction.presence_weighs:
        return mask * (presence >= 0)[:, None, None]
    # A softmax over two logits, to the last bit, which the sigmoid of their difference is not.
    named = torch.stack([torch.zeros_like(presence), presence], dim=-1).softmax(dim=-1)[..., 1]
    return named[:, None, None] * mask


def resized(prediction: Prediction, size: tuple[int, int]) -> Tensor:
    """The mask logits (B, H, W) float32 at `size`, by the resize of inference."""
    logits = prediction.mask.float()
    if logits.shape[-2:] == torch.Size(size):
        return logits
    aligned = prediction.aligned_corners
    return F.interpolate(logits[:, None], size=tuple(size), mode="bilinear", align_corners=aligned)[:, 0]


def _finite(logits: Tensor) -> Tensor:
    """float32; an infinite logit as one that is as sure, for weights of 0 and differences would make NaN of it."""
    return logits.float().nan_to_num(nan=torch.nan, posinf=1e4, neginf=-1e4)
