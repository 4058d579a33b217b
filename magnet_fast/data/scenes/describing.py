"""A scene with its picture and its sentences: those that name one object, and on request several or none."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from magnet_fast.data.scenes.absent import absent_expressions
from magnet_fast.data.scenes.drawing import Scene, draw_scene
from magnet_fast.data.scenes.expressions import Expression
from magnet_fast.data.scenes.generation import random_scene
from magnet_fast.data.scenes.search import ExpressionSearch
from magnet_fast.data.scenes.several import SeveralSearch

Found = TypeVar("Found")
_MINIMUM_VISIBLE = 0.62  # of an object's own pixels
# Chances with which a kind is tried first. Not every scene has an order or a relation to offer, so these are
# set such that the sentences written come out near 35 % attribute, 25 % place, 15 % order, 25 % relation.
_KIND_CHANCES = {
    "easy": {"attribute": 0.8, "place": 0.2},
    "hard": {"attribute": 0.62, "place": 0.15, "order": 0.08, "relation": 0.15},
}


_SEVERAL_CHANCES = {
    "easy": {"attribute": 0.5, "place": 0.25, "pair": 0.25},
    "hard": {"attribute": 0.3, "place": 0.25, "relation": 0.25, "pair": 0.2},
}


@dataclass(frozen=True)
class Referent:
    """What is referred to, by indices of objects, its expressions, and sentences near these that name nothing."""

    indices: tuple[int, ...]
    expressions: tuple[Expression, ...]
    absent: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class DescribedScene:
    """A scene, its picture uint8 (S, S, 3), visible masks bool (N, S, S) and its referents.

    First come two to four single objects with one to three expressions each, then those of several objects.
    """

    scene: Scene
    picture: np.ndarray
    masks: np.ndarray
    referents: tuple[Referent, ...]


def describe_scene(
    seed: int, number: int, level: str, split: str, image_size: int = 128, *, negatives: int = 0, several: int = 0
) -> DescribedScene:
    """Scene `number` of `write_scenes(..., seed, level, image_size)` when that image falls into `split`.

    `negatives` and `several` are as for `write_scenes`; they add sentences and change neither picture nor the others.
    """
    rng = random.Random(f"magnet_fast scene {seed} {number} {level}")
    chances = _kind_chances(level, split)
    while True:
        scene = random_scene(rng, level)
        referents = _choose_referents(scene, rng, chances)
        if referents is None:
            continue
        picture, masks, shown = draw_scene(scene, image_size)
        if shown.min() >= _MINIMUM_VISIBLE:
            break
    if several:
        draws = random.Random(f"magnet_fast several {seed} {number} {level}")
        referents += _choose_several(scene, draws, several, _kind_chances(level, split, _SEVERAL_CHANCES))
    if negatives:
        draws = random.Random(f"magnet_fast negatives {seed} {number} {level}")
        referents = tuple(
            replace(one, absent=absent_expressions(scene, one.expressions, negatives, draws)) for one in referents
        )
    return DescribedScene(scene, picture, masks, referents)


def _kind_chances(level: str, split: str, chances: dict[str, dict[str, float]] = _KIND_CHANCES) -> dict[str, float]:
    if split == "testA":
        return {"attribute": 1.0}
    if split == "testB":
        return {"relation": 1.0} if level == "hard" else {"place": 1.0}
    return chances[level]


def _choose_referents(scene: Scene, rng: random.Random, chances: dict[str, float]) -> tuple[Referent, ...] | None:
    """Two to four objects with one to three expressions each; None if the scene offers fewer than two."""
    search = ExpressionSearch(scene, rng)
    wanted = rng.randint(2, min(4, len(scene.objects)))
    referents = []
    for index in rng.sample(range(len(scene.objects)), len(scene.objects)):
        found: dict[str, Expression] = {}
        for _ in range(rng.choice((1, 2, 2, 3))):
            expression = _find_any(partial(search.find, index=index), rng, chances)
            if expression is not None:
                found.setdefault(expression.text, expression)
        if found:
            referents.append(Referent((index,), tuple(found.values())))
        if len(referents) == wanted:
            break
    return tuple(referents) if len(referents) >= 2 else None


def _choose_several(scene: Scene, rng: random.Random, number: int, chances: dict[str, float]) -> tuple[Referent, ...]:
    """Up to `number` expressions of several objects; those that name the same objects share a referent."""
    search = SeveralSearch(scene, rng)
    found: dict[frozenset[int], dict[str, Expression]] = {}
    for _ in range(number):
        sentence = _find_any(search.find, rng, chances)
        if sentence is None:
            break
        named, expression = sentence
        found.setdefault(named, {}).setdefault(expression.text, expression)
    return tuple(Referent(tuple(sorted(named)), tuple(texts.values())) for named, texts in found.items())


def _find_any(find: Callable[[str], Found | None], rng: random.Random, chances: dict[str, float]) -> Found | None:
    """What `find` finds for a kind drawn by its chance, or for another kind where there is none of that."""
    left = dict(chances)
    while left:
        kind = rng.choices(tuple(left), tuple(left.values()))[0]
        found = find(kind)
        if found is not None:
            return found
        del left[kind]
    return None
