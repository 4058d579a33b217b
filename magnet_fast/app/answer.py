"""What is asked of a model, checked, and what it answers, kept so that a threshold needs no second look."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from magnet_fast.data.tokenizers import shortened
from magnet_fast.data.transforms import as_shown
from magnet_fast.data.transforms.pictures import opened
from magnet_fast.inference import Segmentation, Segmenter

MOST_SENTENCES = 8
MOST_PROBABILITIES = 1 << 28
"""Pixels times sentences: 1 GiB that a browser's page keeps for the threshold."""


@dataclass(frozen=True)
class Answer:
    """What a model found in a picture.

    Attributes:
        name: of the picture's file.
        picture: as it is seen, upright, at its own size, RGB.
        model: the checkpoint's name.
        sentences: what was asked.
        found: what was found for each of them.
    """

    name: str
    picture: Image.Image
    model: str
    sentences: list[str]
    found: list[Segmentation]

    def masks(self, threshold: float) -> list[np.ndarray]:
        """(H, W) bool of each sentence, where its probability exceeds the threshold."""
        return [one.probability > threshold for one in self.found]


def ask(segmenter: Segmenter, model: str, picture: str | os.PathLike[str] | None, text: str) -> Answer:
    """Segment what each line of a text names in a picture's file.

    Args:
        segmenter: the model.
        model: its name, kept for whoever reads the answer.
        picture: the file; None where none was chosen.
        text: sentences, one a line; blank lines are passed over.

    Raises:
        ValueError: there is no picture, it cannot be read or is too large, there is no sentence or too many, or the
            model knows no word of one. Nothing was computed.
    """
    if picture is None:
        raise ValueError("there is no picture: upload one, paste one or take one with the camera")
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise ValueError("there is no sentence: write what to look for, one sentence a line")
    if len(sentences) > MOST_SENTENCES:
        raise ValueError(f"sentences: expected at most {MOST_SENTENCES}, one a line, got {len(sentences)}")
    for sentence, reading in zip(sentences, segmenter.tokenizer.readings(sentences), strict=True):
        if reading.none_known:
            raise ValueError(f"the model knows no word of {shortened(sentence)}: {reading.notes['unknown']}")
    path = Path(picture)
    try:
        with opened(path) as file:
            width, height = file.size
        if width * height * len(sentences) > MOST_PROBABILITIES:
            raise ValueError(
                f"image {path} has {width} x {height} pixels, too many for {len(sentences)} sentences: scale it down"
            )
        shown = as_shown(path)
    except ValueError as error:  # named as who chose it knows it, not by where the server keeps it
        raise ValueError(str(error).replace(str(path), path.name)) from error
    return Answer(path.name, shown, model, sentences, segmenter(shown, sentences))
