"""Drawing of one embedded scene: anti-aliased, textured shapes on an uneven background.

Positions and extents of a scene are fractions of the image side, so one scene can be drawn at any image size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "cross",
    "ring",
    "heart",
    "arrow",
    "moon",
    "box",
    "drop",
)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (38, 158, 62),
    "blue": (42, 84, 222),
    "yellow": (246, 218, 44),
    "orange": (247, 132, 24),
    "purple": (128, 46, 176),
    "pink": (252, 146, 196),
    "cyan": (52, 208, 220),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")

_SUPERSAMPLING = 3
_PALE_COLOURS = frozenset({"yellow", "pink", "cyan"})  # their texture is dark: white would not show


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y` (down): centre, `extent`: larger side, in fractions of the image side."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    extent: float
    rotation: float = 0.0  # radians
    texture_angle: float = 0.0  # radians
    tint: tuple[int, int, int] = (0, 0, 0)  # added to the colour, so that no two reds are quite the same


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order (a later one covers an earlier one) and the seed of background and noise."""

    objects: tuple[SceneObject, ...]
    level: str
    background_seed: int


def draw_scene(scene: Scene, image_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns the picture, uint8 (S, S, 3); the visible masks, bool (N, S, S), one per object in the scene's
    order (a pixel belongs to the last object that covers at least half of it); and the share of each object
    that shows, float64 (N,) in 0..1.
    """
    rng = np.random.default_rng(scene.background_seed)
    canvas = _background(rng, image_size)
    owner = np.full((image_size, image_size), -1, dtype=np.int16)
    covered = np.zeros(len(scene.objects))
    for index, item in enumerate(scene.objects):
        left, top, coverage, paint = _patch(item, image_size)
        height, width = coverage.shape
        region = canvas[top : top + height, left : left + width]
        region += coverage[..., None] * (paint - region)
        solid = coverage >= 0.5
        covered[index] = np.count_nonzero(solid)
        owner[top : top + height, left : left + width][solid] = index
    noise = rng.standard_normal((image_size, image_size, 3), dtype=np.float32)
    canvas += noise * np.float32(rng.uniform(2.0, 7.0))
    np.clip(canvas, 0.0, 255.0, out=canvas)
    masks = owner[None] == np.arange(len(scene.objects), dtype=np.int16)[:, None, None]
    return (canvas + 0.5).astype(np.uint8), masks, masks.sum(axis=(1, 2)) / covered


def _background(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Float32 (S, S, 3): a gradient between two dull tones with low-frequency clouds over it."""
    first, second = _dull_tone(rng), _dull_tone(rng)
    angle = rng.uniform(0.0, 2.0 * math.pi)
    ramp = np.linspace(-0.5, 0.5, image_size, dtype=np.float32)
    blend = 0.5 + ramp[None, :] * np.float32(math.cos(angle)) + ramp[:, None] * np.float32(math.sin(angle))
    np.clip(blend, 0.0, 1.0, out=blend)
    cells = int(rng.integers(3, 9))
    clouds = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    clouds = np.asarray(clouds.resize((image_size, image_size), Image.Resampling.BICUBIC))
    canvas = first + blend[..., None] * (second - first)
    canvas += (clouds * np.float32(rng.uniform(3.0, 14.0)))[..., None]
    return canvas


def _dull_tone(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(70.0, 205.0)
    return (grey + rng.uniform(-16.0, 16.0, size=3)).astype(np.float32)


def _patch(item: SceneObject, image_size: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """The object's window: left, top, coverage float32 (h, w) in 0..1, paint float32 (h, w, 3)."""
    scale = _SUPERSAMPLING
    extent = item.extent * image_size
    reach = _reach(item.shape) * extent + 1.0
    left, top = max(0, int(item.x * image_size - reach)), max(0, int(item.y * image_size - reach))
    right = min(image_size, math.ceil(item.x * image_size + reach))
    bottom = min(image_size, math.ceil(item.y * image_size + reach))
    width, height = right - left, bottom - top
    centre_x, centre_y = item.x * image_size - left, item.y * image_size - top

    fine = Image.new("L", (width * scale, height * scale))
    outline = Image.new("L", fine.size)
    pen, line_pen = ImageDraw.Draw(fine), ImageDraw.Draw(outline)
    line_width = max(1, round(scale * extent / 24.0))
    cosine, sine = math.cos(item.rotation), math.sin(item.rotation)
    for loop, solid in _outline(item.shape):
        points = [
            (
                (centre_x + extent * (cosine * u - sine * v)) * scale,
                (centre_y + extent * (sine * u + cosine * v)) * scale,
            )
            for u, v in loop
        ]
        pen.polygon(points, fill=255 if solid else 0)
        line_pen.line([*points, points[0]], fill=255, width=line_width)
    coverage = np.asarray(fine.reduce(scale), dtype=np.float32) / np.float32(255.0)
    edge = np.asarray(outline.reduce(scale), dtype=np.float32) / np.float32(255.0)

    main = np.clip(np.add(COLOURS[item.colour], item.tint), 0, 255).astype(np.float32)
    paint = np.broadcast_to(main, (height, width, 3))
    if item.texture != "plain":
        pattern = _pattern(item, width, height, centre_x, centre_y, extent, scale)
        second = main * np.float32(0.35) if item.colour in _PALE_COLOURS else main * np.float32(0.2) + 200.0
        paint = paint + pattern[..., None] * (second - main)
    dark = main * np.float32(0.55)  # a darker rim keeps overlapping objects of one colour apart
    return left, top, coverage, paint + (edge * np.float32(0.8))[..., None] * (dark - paint)


def _pattern(
    item: SceneObject, width: int, height: int, centre_x: float, centre_y: float, extent: float, scale: int
) -> np.ndarray:
    """Share of the texture's second colour, float32 (h, w) in 0..1."""
    across = (np.arange(width * scale, dtype=np.float32) + 0.5) / scale - np.float32(centre_x)
    down = (np.arange(height * scale, dtype=np.float32) + 0.5) / scale - np.float32(centre_y)
    cosine, sine = np.float32(math.cos(item.texture_angle)), np.float32(math.sin(item.texture_angle))
    u = cosine * across[None, :] + sine * down[:, None]
    if item.texture == "striped":
        pitch = np.float32(0.26 * extent)
        filled = (u / pitch) % 1.0 < 0.45
    else:
        v = cosine * down[:, None] - sine * across[None, :]
        if item.texture == "dotted":
            pitch = np.float32(0.3 * extent)
            filled = ((u / pitch) % 1.0 - 0.5) ** 2 + ((v / pitch) % 1.0 - 0.5) ** 2 < 0.095
        else:
            pitch = np.float32(0.23 * extent)
            filled = (np.floor(u / pitch) + np.floor(v / pitch)) % 2.0 < 1.0
    return filled.reshape(height, scale, width, scale).mean(axis=(1, 3), dtype=np.float32)


@functools.cache
def _outline(shape: str) -> tuple[tuple[tuple[tuple[float, float], ...], bool], ...]:
    """Loops of a shape in a unit box around the origin, each with whether it fills (True) or cuts (False)."""

    def regular(count: int, radius: float, start: float = -math.pi / 2) -> list[tuple[float, float]]:
        step = 2.0 * math.pi / count
        return [(radius * math.cos(start + step * i), radius * math.sin(start + step * i)) for i in range(count)]

    if shape == "circle":
        loops = [(regular(40, 0.48), True)]
    elif shape == "square":
        loops = [([(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)], True)]
    elif shape == "triangle":
        loops = [([(0.0, -0.5), (0.54, 0.44), (-0.54, 0.44)], True)]
    elif shape == "star":
        outer, inner = regular(5, 0.57), regular(5, 0.25, -math.pi / 2 + math.pi / 5)
        loops = [([point for pair in zip(outer, inner, strict=True) for point in pair], True)]
    elif shape == "diamond":
        loops = [([(0.0, -0.56), (0.38, 0.0), (0.0, 0.56), (-0.38, 0.0)], True)]
    elif shape == "cross":
        a, b = 0.17, 0.5
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        loops = [([*corners, (-b, -a), (-a, -a)], True)]
    elif shape == "ring":
        loops = [(regular(40, 0.5), True), (regular(40, 0.25), False)]
    elif shape == "heart":
        curve = [2.0 * math.pi * i / 48 for i in range(48)]
        loops = [([(0.51 * math.sin(t) ** 3, _heart_height(t)) for t in curve], True)]
    elif shape == "arrow":
        head = [(0.52, 0.0), (0.06, -0.46), (0.06, -0.17), (-0.5, -0.17)]
        loops = [([*head, (-0.5, 0.17), (0.06, 0.17), (0.06, 0.46)], True)]
    elif shape == "moon":
        loops = [([(x + 0.12, y) for x, y in _crescent(0.52, 0.44, 0.3)], True)]
    elif shape == "box":
        loops = [([(-0.53, -0.29), (0.53, -0.29), (0.53, 0.29), (-0.53, 0.29)], True)]
    elif shape == "drop":
        arc = [math.radians(degrees) for degrees in range(-35, 216, 10)]
        loops = [([(0.0, -0.56), *((0.36 * math.cos(t), 0.18 + 0.36 * math.sin(t)) for t in arc)], True)]
    else:
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    return tuple((tuple(loop), solid) for loop, solid in loops)


@functools.cache
def _reach(shape: str) -> float:
    """Largest distance of a shape's outline from its centre, in extents: how far it gets when rotated."""
    return max(math.hypot(u, v) for loop, _ in _outline(shape) for u, v in loop)


def _heart_height(t: float) -> float:
    curve = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return -0.032 * curve - 0.05


def _crescent(outer: float, inner: float, shift: float) -> list[tuple[float, float]]:
    """A disc without a smaller disc whose centre lies `shift` to the right, as one loop."""
    cross_x = (outer**2 - inner**2 + shift**2) / (2.0 * shift)
    cross_y = math.sqrt(outer**2 - cross_x**2)
    begin, end = math.atan2(cross_y, cross_x), 2.0 * math.pi - math.atan2(cross_y, cross_x)
    arc = [begin + (end - begin) * i / 30 for i in range(31)]
    back_begin = 2.0 * math.pi - math.atan2(cross_y, cross_x - shift)
    back_end = math.atan2(cross_y, cross_x - shift)
    back = [back_begin + (back_end - back_begin) * i / 24 for i in range(1, 24)]
    return [(outer * math.cos(t), outer * math.sin(t)) for t in arc] + [
        (shift + inner * math.cos(t), inner * math.sin(t)) for t in back
    ]
