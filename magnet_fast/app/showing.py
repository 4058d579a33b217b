"""An answer for the eye: the masks over the picture, and what each colour means."""

from __future__ import annotations

import html

import numpy as np
from PIL import Image

from magnet_fast import visualize
from magnet_fast.app.answer import MOST_SENTENCES, Answer
from magnet_fast.data.transforms.pictures import resize_nearest
from magnet_fast.inference import Segmentation

COLOURS = (
    visualize.PREDICTION_COLOUR,
    (40, 110, 255),
    (255, 165, 0),
    (30, 170, 80),
    (190, 70, 230),
    (0, 185, 205),
    (255, 105, 180),
    (150, 95, 40),
)
assert len(COLOURS) == MOST_SENTENCES
_SIDE = 1600  # pixels; more no page shows, and drawing and sending them takes seconds


def drawn(answer: Answer, masks: list[np.ndarray]) -> Image.Image:
    """The picture, at most 1600 pixels a side, with each sentence's mask over it in the sentence's colour."""
    picture = answer.picture.copy()
    picture.thumbnail((_SIDE, _SIDE))
    small = [resize_nearest(mask.astype(np.uint8), (picture.height, picture.width)) for mask in masks]
    return visualize.overlay_each(picture, small, COLOURS[: len(masks)])


def legend(answer: Answer, masks: list[np.ndarray], threshold: float) -> str:
    """HTML: a line a sentence with its colour, how much of the picture it names, and what of it was not read."""
    rows = []
    for sentence, one, mask, colour in zip(answer.sentences, answer.found, masks, COLOURS, strict=False):
        swatch = f'<span class="swatch" style="background: rgb{colour}"></span>'
        rows.append(f"<li>{swatch}<b>{html.escape(sentence)}</b> {html.escape(said(one, mask, threshold))}</li>")
    return f"<ol>{''.join(rows)}</ol>"


def said(one: Segmentation, mask: np.ndarray, threshold: float) -> str:
    """What there is to say of what was found for a sentence, with its mask at a threshold."""
    parts = []
    if one.present is False:
        parts.append(f"nothing of that kind is here ({1 - one.presence:.2f})")
    if mask.any():
        parts.append(
            f"{100 * mask.mean():.1f} % of the picture above {threshold:g}, highest {one.probability.max():.2f}"
        )
    elif one.present is not False:
        parts.append(f"no probability above {threshold:g}, highest {one.probability.max():.2f}")
    if one.reading is not None:
        parts += one.reading.notes.values()
    return "; ".join(parts)
