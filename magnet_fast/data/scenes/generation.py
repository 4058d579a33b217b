"""Random scenes: objects that resemble one another, placed with slight overlaps only."""

from __future__ import annotations

import math
import random

from magnet_fast.data.scenes.drawing import COLOURS, SHAPES, SIZES, TEXTURES, Scene, SceneObject

LEVELS = ("easy", "hard")
_COUNTS = {"easy": ((2, 3, 4), (2, 4, 4)), "hard": ((5, 6, 7, 8, 9, 10), (3, 4, 4, 3, 3, 2))}
_EXTENTS = {  # of the image side; small and large never meet
    "easy": {"small": (22 / 128, 28 / 128), "large": (36 / 128, 46 / 128)},
    "hard": {"small": (17 / 128, 22 / 128), "large": (28 / 128, 36 / 128)},
}
_RANGES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "texture": TEXTURES}


def random_scene(rng: random.Random, level: str) -> Scene:
    """A scene of 2-4 ("easy") or 5-10 ("hard") objects; most differ from another one in one property only."""
    while True:
        count = rng.choices(*_COUNTS[level])[0]
        looks = _random_looks(rng, count, level)
        placed = _place(rng, looks, level)
        if placed is not None:
            return Scene(tuple(placed), level, rng.getrandbits(63))


def _random_looks(rng: random.Random, count: int, level: str) -> list[dict[str, str]]:
    first = {name: rng.choice(values) for name, values in _RANGES.items()}
    if rng.random() < 0.4:
        first["texture"] = "plain"
    looks = [first]
    # Few values per scene: descriptions then need several words, and there are like objects to count.
    few = {name: rng.sample(values, min(len(values), rng.choice((2, 3)))) for name, values in _RANGES.items()}
    while len(looks) < count:
        look = dict(rng.choice(looks))
        changes = rng.choices((0, 1, 2, 3), (0.15, 0.5, 0.25, 0.1) if level == "easy" else (0.2, 0.5, 0.2, 0.1))[0]
        for name in rng.sample(tuple(_RANGES), changes):
            others = [value for value in few[name] if value != look[name]]
            look[name] = rng.choice(others)
        looks.append(look)
    if level == "hard":  # many large objects do not fit
        large = [look for look in looks if look["size"] == "large"]
        for look in large[max(2, 12 - count) :]:
            look["size"] = "small"
    rng.shuffle(looks)
    return looks


def _place(rng: random.Random, looks: list[dict[str, str]], level: str) -> list[SceneObject] | None:
    """Objects at random places, neighbours overlapping slightly at most; None if they do not fit."""
    closeness = rng.choice((0.8, 0.88, 1.0))  # of the sum of two radii
    placed: list[SceneObject] = []
    for look in sorted(looks, key=lambda look: look["size"] == "small"):
        extent = rng.uniform(*_EXTENTS[level][look["size"]])
        border = 0.5 * extent + 0.01
        for _ in range(40):
            x, y = rng.uniform(border, 1.0 - border), rng.uniform(border, 1.0 - border)
            if all(
                math.hypot(x - other.x, y - other.y) >= closeness * 0.5 * (extent + other.extent) for other in placed
            ):
                break
        else:
            return None
        placed.append(
            SceneObject(
                **look,
                x=x,
                y=y,
                extent=extent,
                rotation=_rotation(rng, look["shape"]),
                texture_angle=rng.uniform(0.0, math.pi),
                tint=(rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12)),
            )
        )
    rng.shuffle(placed)  # the drawing order: either size may lie on top
    return placed


def _rotation(rng: random.Random, shape: str) -> float:
    turn = rng.uniform(-0.2, 0.2)
    if shape in ("arrow", "moon"):
        turn += rng.randrange(4) * 0.5 * math.pi
    elif shape == "box":
        turn += rng.randrange(2) * 0.5 * math.pi
    return turn
