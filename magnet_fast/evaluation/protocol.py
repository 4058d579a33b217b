"""Protocols: how published numbers of referring segmentation were taken, each as its authors' code takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from magnet_fast.evaluation.metrics import DEFAULT_RULE, Rule
from magnet_fast.models.contract import Prediction, probability

RESOLUTIONS = ("input", "original")


class Protocol(NamedTuple):
    """One way to score.

    Attributes:
        says: it in words, for tables.
        fits: for each resolution it offers, how images may be fitted to the model's square (`InputSpec.fit`).
        tasks: whose scores it defines; empty: those of any.
        threshold: a pixel is predicted where its probability exceeds this; None: where it exceeds the model's own.
        gated: a mask is emptied where the model claims nothing. Otherwise the mask stays and the flag alone decides.
        bicubic: probabilities, not logits, are resized to the square, bicubically.
        rule: how IoUs are read.
        truth: how the ground truth comes to the square, as `ExpressionDataset` names it.
    """

    says: str
    fits: dict[str, tuple[str, ...]]
    tasks: tuple[str, ...] = ()
    threshold: float | None = None
    gated: bool = True
    bicubic: bool = False
    rule: Rule = DEFAULT_RULE
    truth: str = "resized"


PROTOCOLS: dict[str, Protocol] = {
    # LAVT, MagNet. At the images' own size the way back of any fit is as good as that of the squash.
    "family": Protocol(
        "every sentence of every referent, the model's own threshold; P@X counts IoU >= X",
        {"input": ("squash",), "original": ("squash", "letterbox", "longest")},
    ),
    # ReLA: its evaluator reads the mask and the flag apart, and the ground truth at the model's square.
    "gres": Protocol(
        "every sentence, probability > 0.5, the flag alone says whether something is named; Pr@X counts IoU >= X",
        {"input": ("squash",)},
        tasks=("generalized", "single"),
        threshold=0.5,
        gated=False,
        truth="polygons",
    ),
    # CRIS. Its code tests on every sentence; only its validation between epochs takes the first of each ref.
    "cris": Protocol(
        "every sentence, letterbox warped back, probability > 0.35, IoU = I / (U + 1e-6); P@X counts IoU > X",
        {"original": ("letterbox",)},
        tasks=("single",),
        threshold=0.35,
        bicubic=True,
        rule=Rule(strict=True, epsilon=1e-6),
    ),
}


def find_protocol(name: str, task: str, resolution: str, fit: str) -> Protocol:
    """A protocol by name, for a task, a resolution and a dataset's fit that it has a rule for.

    Raises:
        ValueError: for a name that is no protocol's, or where it says nothing about one of the others.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution: expected one of {', '.join(RESOLUTIONS)}, got {resolution!r}")
    protocol = PROTOCOLS[name]
    if protocol.tasks and task not in protocol.tasks:
        raise ValueError(f"task: protocol {name!r} is for {' and '.join(protocol.tasks)}, got {task!r}")
    if resolution not in protocol.fits:
        offered = " and ".join(protocol.fits)
        raise ValueError(f"resolution: protocol {name!r} compares at resolution {offered}, got {resolution!r}")
    fits = protocol.fits[resolution]
    if fit not in fits:
        raise ValueError(
            f"dataset: protocol {name!r} at resolution {resolution!r} is for images fitted by {' or '.join(fits)}; "
            f"this one's are fitted by {fit}"
        )
    return protocol


def choose_truth(given: str | None, protocol: str, reader: Any, fit: str) -> str:
    """How the ground truth comes to the square: as given, else as the protocol asks where data and fit allow it.

    Args:
        given: `truth` of `ExpressionDataset`, or None.
        protocol: a name.
        reader: of the data.
        fit: of the images.
    """
    if given is not None:
        return given
    asked = PROTOCOLS[protocol].truth if protocol in PROTOCOLS else "resized"
    possible = asked == "resized" or (fit == "squash" and hasattr(reader, "mask_at"))
    return asked if possible else "resized"


def probability_at_input(prediction: Prediction, protocol: Protocol, size: tuple[int, int]) -> Tensor:
    """(B, H, W) float32 at the model's square, as the protocol makes it."""
    if not protocol.gated:
        prediction = prediction._replace(presence=None)
    if protocol.bicubic:
        small = probability(prediction, prediction.mask.shape[-2:])
        return F.interpolate(small[:, None], size=size, mode="bicubic", align_corners=True)[:, 0]
    return probability(prediction, size)


def probability_at_original(
    prediction: Prediction,
    protocol: Protocol,
    way_back: Callable[[Tensor, tuple[int, int]], Tensor] | None,
    square: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """(H, W) float32 at an image's own size, of a prediction for one sentence.

    Args:
        prediction: of a batch of one.
        protocol: how.
        way_back: from a map (S, S) on the model's square and (H, W) to a map (H, W); None where images were squashed:
            logits go straight to (H, W) then, one resize, not two.
        square: (S, S), the model's square.
        size: (H, W) of the image.
    """
    if way_back is None:
        return probability_at_input(prediction, protocol, size)[0]
    return way_back(probability_at_input(prediction, protocol, square)[0], size)
