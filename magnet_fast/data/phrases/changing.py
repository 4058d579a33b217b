"""Photographs changed at random: mirrored, cropped, with objects pasted in, in other light.

Sentences are made afterwards, from what is to be seen then: so "left" is left, and what a crop cut off is not
spoken of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from magnet_fast.data.phrases.photograph import Photograph

_LEFT_OVER = 0.4  # share of a region that must be left for a sentence to name it alone [our choice]
_GONE = 0.0003  # share of the picture below which a region that was cut is forgotten
_WHOLE = 0.2  # share of photographs that are not cropped
_SMALLEST_CROP = 0.3  # share of the photograph


class Cutout(NamedTuple):
    """An object cut out of a photograph.

    Attributes:
        pixels: uint8 (h, w, 3).
        mask: bool (h, w).
        name: its class.
    """

    pixels: np.ndarray
    mask: np.ndarray
    name: str


def cut_out(photo: Photograph, region: int) -> Cutout | None:
    """One object of a photograph; None for stuff, crowds, what is small, and what the picture's border cuts."""
    left, top, right, bottom = photo.boxes[region]
    margin = 0.005
    inside = min(left, top) > margin and max(right, bottom) < 1 - margin
    if not (inside and photo.things[region] and photo.clear[region] and photo.areas[region] >= 2 * _LEFT_OVER / 100):
        return None
    height, width = photo.pixels.shape[:2]
    rows = slice(round(top * height), round(bottom * height))
    columns = slice(round(left * width), round(right * width))
    return Cutout(photo.pixels[rows, columns], photo.masks[region, rows, columns], photo.names[region])


def mirrored(photo: Photograph) -> Photograph:
    """Left and right exchanged."""
    return replace(photo, pixels=photo.pixels[:, ::-1], masks=photo.masks[:, :, ::-1])


def cropped(photo: Photograph, box: tuple[int, int, int, int], size: int) -> Photograph:
    """A part of a photograph, left, top, right and bottom in pixels, brought to `size` x `size`.

    Pixels by Pillow's bilinear filter, masks by nearest neighbour. Regions of which nearly nothing is left are
    forgotten, those of which less than two fifths are left become vague.
    """
    left, top, right, bottom = box
    whole = Image.fromarray(np.ascontiguousarray(photo.pixels))
    pixels = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box))
    rows = top + ((np.arange(size) + 0.5) * (bottom - top) / size).astype(int)
    columns = left + ((np.arange(size) + 0.5) * (right - left) / size).astype(int)
    masks = photo.masks[:, rows][:, :, columns]
    share = (bottom - top) * (right - left) / (photo.pixels.shape[0] * photo.pixels.shape[1])
    before = photo.areas / share  # in the crop's measure
    return _left_over(replace(photo, pixels=pixels, masks=masks), before)


def random_box(photo: Photograph, draw: random.Random) -> tuple[int, int, int, int]:
    """The whole photograph, or a part of at least three tenths of it and at most a third longer or wider."""
    height, width = photo.pixels.shape[:2]
    if draw.random() < _WHOLE:
        return 0, 0, width, height
    area, stretch = draw.uniform(_SMALLEST_CROP, 1), draw.uniform(0.75, 1.33) ** 0.5
    w = min(width, max(1, round(width * area**0.5 * stretch)))
    h = min(height, max(1, round(height * area**0.5 / stretch)))
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    return left, top, left + w, top + h


def pasted(photo: Photograph, cutout: Cutout, height: float, place: tuple[float, float]) -> Photograph:
    """With an object more, in front of what was there.

    Args:
        height: of the object, as a share of the picture's; it keeps its aspect ratio, and shrinks where it is too wide.
        place: x and y from 0 to 1, of its free way from one side to the other.
    """
    size_y, size_x = photo.pixels.shape[:2]
    h, w = cutout.mask.shape
    scale = min(height * size_y / h, 0.9 * size_x / w)
    h, w = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = round(place[1] * max(size_y - h, 0)), round(place[0] * max(size_x - w, 0))
    h, w = min(h, size_y - top), min(w, size_x - left)
    colours = np.asarray(Image.fromarray(np.ascontiguousarray(cutout.pixels)).resize((w, h), Image.Resampling.BILINEAR))
    shape = Image.fromarray(cutout.mask.astype(np.uint8) * 255).resize((w, h), Image.Resampling.BILINEAR)
    soft = np.asarray(shape.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)[..., None] / 255
    here = np.asarray(shape) >= 128
    pixels = photo.pixels.copy()
    window = pixels[top : top + h, left : left + w]
    window[:] = np.rint(soft * colours + (1 - soft) * window).astype(np.uint8)
    before = photo.areas
    masks = np.concatenate([photo.masks, np.zeros((1, size_y, size_x), dtype=bool)])
    masks[:-1, top : top + h, left : left + w] &= ~here
    masks[-1, top : top + h, left : left + w] = here
    with_it = replace(
        photo,
        pixels=pixels,
        masks=masks,
        names=(*photo.names, cutout.name),
        things=np.append(photo.things, True),
        crowds=np.append(photo.crowds, False),
        vague=np.append(photo.vague, False),
    )
    return _left_over(with_it, np.append(before, 0))


def relit(photo: Photograph, draw: random.Random) -> Photograph:
    """In other light: brightness, contrast and saturation changed by up to a third, each."""
    brightness, contrast, saturation = (draw.uniform(0.67, 1.33) for _ in range(3))
    pixels = photo.pixels.astype(np.float32) * brightness
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pixels = grey[..., None] + saturation * (pixels - grey[..., None])
    pixels = grey.mean() + contrast * (pixels - grey.mean())
    return replace(photo, pixels=np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def changed(
    photo: Photograph,
    size: int,
    pastes: float,
    find: Callable[[str | None, random.Random], Cutout | None],
    draw: random.Random,
) -> Photograph:
    """All changes, one after the other, brought to `size` x `size`.

    Args:
        pastes: how many objects are pasted in, on average; at most two. Half of them are of a class that is there.
        find: gives an object of a class, or of any for None; None where it has none.
        draw: the chances.
    """
    if draw.random() < 0.5:
        photo = mirrored(photo)
    photo = cropped(photo, random_box(photo, draw), size)
    for _ in range(2):
        if draw.random() >= pastes / 2:
            continue
        alike = [region for region in np.flatnonzero(photo.things & photo.clear)]
        model = draw.choice(alike) if alike and draw.random() < 0.5 else None
        cutout = find(None if model is None else photo.names[model], draw)
        if cutout is not None:
            height = draw.uniform(0.15, 0.6)
            if model is not None:
                box = photo.boxes[model]
                height = min(0.8, (box[3] - box[1]) * draw.uniform(0.6, 1.6))
            photo = pasted(photo, cutout, height, (draw.random(), draw.random()))
    return relit(photo, draw)


def _left_over(photo: Photograph, before: Sequence[float]) -> Photograph:
    """Regions that lost most of themselves become vague, or are forgotten; `before` is what they had, as areas now."""
    before = np.asarray(before)
    lost = photo.areas < _LEFT_OVER * before
    vague = photo.vague | lost
    return replace(photo, vague=vague).only((photo.areas > 0) & ~(lost & (photo.areas < _GONE)))
