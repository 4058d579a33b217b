"""Pictures of masks: overlays and contact sheets, with Pillow alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cache

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
        image: RGB, (H, W, 3) uint8 if an array, as the mask lies: `data.transforms.as_shown` of a photo.
        mask: (H, W), true at the referent. Where it is empty the whole image fades.
        colour: of the mask.
        opacity: of the tint, 0 … 1; the outline is opaque.

    Raises:
        ValueError: the mask has another size, or the image has pixels of more than 8 bits.
    """
    return overlay_each(image, [mask], [colour], opacity)


def overlay_each(
    image: Image.Image | np.ndarray,
    masks: Sequence[np.ndarray],
    colours: Sequence[tuple[int, int, int]],
    opacity: float = 0.35,
) -> Image.Image:
    """`overlay` of several masks, each in its own colour; where they meet, tints mix and the last outline lies on top.

    Args:
        image, opacity: as in `overlay`.
        masks: (H, W) each. What is in none of them fades.
        colours: one a mask.

    Raises:
        ValueError: a mask has another size, there are fewer colours or more, or the image has pixels of more than 8
            bits.
    """
    pixels = np.asarray(_rgb(image) if isinstance(image, Image.Image) else image)
    masks = [np.asarray(mask).astype(bool) for mask in masks]
    if pixels.dtype != np.uint8:
        raise ValueError(f"image: expected uint8, got {pixels.dtype}; magnet_fast.data.transforms.as_rgb makes it so")
    for mask in masks:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"mask: expected the image's height and width, got {mask.shape} for an image of {pixels.shape}"
            )
    if len(colours) != len(masks):
        raise ValueError(f"colours: expected one of each of {len(masks)} masks, got {len(colours)}")
    drawn = pixels.astype(np.float32)
    outside = ~np.logical_or.reduce(masks)
    grey = drawn[outside].mean(axis=-1, keepdims=True)
    drawn[outside] = 0.3 * drawn[outside] + 0.35 * grey + 0.35 * 255
    tints = [np.array(colour, dtype=np.float32) for colour in colours]
    for mask, tint in zip(masks, tints, strict=True):
        drawn[mask] += opacity * (tint - drawn[mask])
    for mask, tint in zip(masks, tints, strict=True):
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

    Text stays in its column: words that are longer are broken, and what exceeds the row ends in "…". A letter that
    Pillow's font lacks is drawn as its code, \\u7ea2, and a warning says so.

    Args:
        examples: at least one.
        columns: rows beside each other.
        cell: height of a row in pixels; pictures are fitted into cell x cell.
        title: a line at the top.
    """
    if not examples:
        raise ValueError("examples: a contact sheet needs at least one")
    gap, text_width = 8, round(cell * 1.1)
    font, small = _font(round(cell / 12)), _font(round(cell / 14))
    header = round(cell / 6) + (round(cell / 5) if title else 0)
    row_width = 3 * cell + text_width + 4 * gap
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * row_width + gap, header + rows * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    codes: set[str] = set()

    def write(x: int, y: int, text: str, width: int, height: int, grey: bool = False) -> None:
        chosen = small if grey else font
        drawn = "".join(_drawable(letter, chosen, codes) for letter in " ".join(text.split()))
        step = sum(chosen.getmetrics()) + 2
        for line in _lines(drawn, chosen, width, max(1, height // step)):
            draw.text((x, y), line, fill=(110, 110, 110) if grey else "black", font=chosen)
            y += step

    if title:
        write(gap, gap, title, sheet.width - 2 * gap, 0)
    note_height = round(cell / 9)
    for column in range(columns):
        left = gap + column * row_width
        places = (
            left,
            left + cell + gap,
            left + cell + text_width + 2 * gap,
            left + 2 * cell + text_width + 3 * gap,
        )
        for x, name in zip(places, ("image", "expression", "truth", "prediction"), strict=True):
            write(x, header - note_height, name, cell, 0, grey=True)
        for row, example in enumerate(examples[column * rows : (column + 1) * rows]):
            top = header + gap + row * (cell + gap)
            pictures = (
                _rgb(example.image),
                overlay(example.image, example.truth, TRUTH_COLOUR),
                overlay(example.image, example.prediction, PREDICTION_COLOUR),
            )
            for x, picture in zip((places[0], places[2], places[3]), pictures, strict=True):
                _paste_fitted(sheet, picture, (x, top), cell)
            write(places[1], top + gap, example.expression, text_width, cell - note_height - 2 * gap)
            write(places[1], top + cell - note_height, example.note, text_width, 0, grey=True)
    if codes:
        shown = ", ".join(sorted(codes)[:5]) + (", …" if len(codes) > 5 else "")
        warnings.warn(
            f"contact sheet: the font lacks {len(codes)} letters, drawn as their codes: {shown}", stacklevel=2
        )
    return sheet


def roles_and_instances(
    image: Image.Image, words: Sequence[str], roles: np.ndarray, instances: np.ndarray, names: Sequence[str]
) -> Image.Image:
    """What a model of relations sees: the picture in the colours of the instances that its pixels chose, and under it
    the words, each the darker the more it says of a role.

    Args:
        image: as it was given to the model, squashed or not.
        words: T of them, tokens if need be.
        roles: (K, T), from 0 to 1: `extra["roles"]` of one prediction.
        instances: (N, h, w), each pixel's part in each instance: `extra["instances"]` of it.
        names: of the K roles.

    Raises:
        ValueError: there are not as many roles as names, or not as many columns as words.
    """
    if np.shape(roles) != (len(names), len(words)):
        raise ValueError(f"roles: expected {len(names)} rows for {len(words)} words, got {np.shape(roles)}")
    chosen = Image.fromarray(np.argmax(instances, axis=0).astype(np.int32)).resize(image.size, Image.Resampling.NEAREST)
    count = len(instances)
    colours = [tuple(round(255 * one) for one in hsv_to_rgb(n / count, 0.9, 0.9)) for n in range(count)]
    drawn = overlay_each(image, [np.asarray(chosen) == n for n in range(count)], colours)
    font, gap = _font(12), 6
    line = sum(font.getmetrics()) + gap
    codes: set[str] = set()
    columns = ["".join(_drawable(letter, font, codes) for letter in word) for word in ("", *words)]
    widths = [round(font.getlength(word)) + 2 * gap for word in columns]
    widths[0] = max(round(font.getlength(name)) for name in names) + 2 * gap
    sheet = Image.new("RGB", (max(drawn.width, sum(widths)), drawn.height + line * len(names) + gap), "white")
    sheet.paste(drawn, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        x, y = 0, drawn.height + gap + row * line
        for column, (word, width) in enumerate(zip(columns, widths, strict=True)):
            part = float(roles[row][column - 1]) if column else 0.0
            shade = round(255 * (1 - part))
            draw.rectangle((x, y, x + width - 1, y + line - 1), fill=(shade,) * 3)
            draw.text(
                (x + gap, y + gap // 2), word if column else name, fill="white" if part > 0.5 else "black", font=font
            )
            x += width
    return sheet


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow would cut off what exceeds 255
        raise ValueError(
            f"image: expected 8 bits a pixel, got mode {image.mode}; magnet_fast.data.transforms.as_rgb makes it so"
        )
    return image.convert("RGB")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _drawable(letter: str, font: ImageFont.FreeTypeFont, codes: set[str]) -> str:
    """The letter, or its code where it cannot be seen or the font has none; the codes used are added to `codes`."""
    if letter == " " or (letter.isprintable() and _glyph(font, letter) != _glyph(font, "\U0010ffff")):
        return letter
    code = letter.encode("unicode_escape").decode()
    codes.add(code)
    return code


@cache
def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Text broken into lines of at most `width` pixels, at spaces where there are any; "…" ends what is too long."""
    lines = []
    while text:
        fits = _fitting(text, font, width)
        if len(lines) + 1 == most and fits < len(text):
            return [*lines, text[: max(1, _fitting(text, font, width - font.getlength("…")))] + "…"]
        space = text.rfind(" ", 0, fits + 1)
        end = fits if fits == len(text) or space <= 0 else space
        lines.append(text[:end])
        text = text[end:].lstrip(" ")
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many of the first letters are at most `width` pixels wide; at least one."""
    text = text[: max(1, int(width))]  # no letter is narrower than a pixel
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


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
