"""Pictures of masks: overlays and contact sheets, with Pillow alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PREDICTION_COLOUR = (255, 64, 64)
TRUTH_COLOUR = (40, 190, 90)


def overlay(
    image: Image.Image | np.ndarray,
    mask: np.ndarray,
    colour: tuple[int, int, int] = PREDICTION_COLOUR,
    opacity: float = 0.35,
) -> Image.Image:
    """The image with a mask laid over it: tinted inside with a solid outline, faded towards grey outside.

    The fading shows a mask also on an object of the mask's own colour.

    Args:
        image: RGB, (H, W, 3) uint8 if an array.
        mask: (H, W), true at the referent. Where it is empty the whole image fades.
        colour: of the mask.
        opacity: of the tint, 0 … 1; the outline is opaque.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    mask = np.asarray(mask).astype(bool)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or mask.shape != pixels.shape[:2]:
        raise ValueError(
            f"mask: expected the image's height and width, got {mask.shape} for an image of {pixels.shape}"
        )
    tint = np.array(colour, dtype=np.float32)
    drawn = pixels.astype(np.float32)
    grey = drawn[~mask].mean(axis=-1, keepdims=True)
    drawn[~mask] = 0.3 * drawn[~mask] + 0.35 * grey + 0.35 * 255
    drawn[mask] += opacity * (tint - drawn[mask])
    drawn[_outline(mask, max(1, round(min(mask.shape) / 100)))] = tint
    return Image.fromarray(drawn.round().astype(np.uint8))


@dataclass(frozen=True)
class Example:
    """One row of a contact sheet.

    Attributes:
        image: the picture.
        expression: what was asked.
        truth, prediction: (H, W) masks.
        note: a few words beside it (the IoU).
    """

    image: Image.Image
    expression: str
    truth: np.ndarray
    prediction: np.ndarray
    note: str = ""


def contact_sheet(examples: Sequence[Example], columns: int = 1, cell: int = 192, title: str = "") -> Image.Image:
    """A sheet of rows image / expression / truth / prediction.

    Args:
        examples: at least one.
        columns: rows beside each other.
        cell: height of a row in pixels; pictures are fitted into cell x cell.
        title: a line at the top.
    """
    if not examples:
        raise ValueError("examples: a contact sheet needs at least one")
    gap, text_width = 8, round(cell * 1.1)
    font, small = ImageFont.load_default(size=round(cell / 12)), ImageFont.load_default(size=round(cell / 14))
    header = round(cell / 6) + (round(cell / 5) if title else 0)
    row_width = 3 * cell + text_width + 4 * gap
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * row_width + gap, header + rows * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), title, fill="black", font=font)
    for column in range(columns):
        left = gap + column * row_width
        places = (
            left,
            left + cell + gap,
            left + cell + text_width + 2 * gap,
            left + 2 * cell + text_width + 3 * gap,
        )
        for x, name in zip(places, ("image", "expression", "truth", "prediction"), strict=True):
            draw.text((x, header - round(cell / 9)), name, fill=(110, 110, 110), font=small)
        for row, example in enumerate(examples[column * rows : (column + 1) * rows]):
            top = header + gap + row * (cell + gap)
            pictures = (
                example.image.convert("RGB"),
                overlay(example.image, example.truth, TRUTH_COLOUR),
                overlay(example.image, example.prediction, PREDICTION_COLOUR),
            )
            for x, picture in zip((places[0], places[2], places[3]), pictures, strict=True):
                _paste_fitted(sheet, picture, (x, top), cell)
            characters = max(8, int(text_width / (font.getlength("abcdefghij klmnop") / 17)))
            lines = textwrap.wrap(example.expression, characters)[:8]
            draw.multiline_text((places[1], top + gap), "\n".join(lines), fill="black", font=font, spacing=4)
            draw.text((places[1], top + cell - round(cell / 9)), example.note, fill=(110, 110, 110), font=small)
    return sheet


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of the mask within `width` steps (up, down, left, right) of its border."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _paste_fitted(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], cell: int) -> None:
    scale = cell / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    fitted = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(fitted, (corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2))
