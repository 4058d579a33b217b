"""Search for sentences that name several objects of a scene, all that fit, or two by a phrase each.

Candidates are tried on the evaluator itself, `expressions.describes`; pictures offer few, so this is quick enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from magnet_fast.data.scenes.drawing import Scene
from magnet_fast.data.scenes.expressions import (
    CORNERS,
    EXTREMES,
    HALVES,
    RELATIONS,
    Description,
    Expression,
    describes,
    is_unambiguous,
)
from magnet_fast.data.scenes.search import MAX_WORDS, SUBSETS, ExpressionSearch
from magnet_fast.data.scenes.wording import word_expression

_PLACES = (*HALVES, *CORNERS, "middle")
_COUNTS = (2, 3)  # for what is farthest to a side, closest or farthest
_COUNT_SHARE = 0.5  # of the other sentences, that say how many there are


class SeveralSearch:
    """Finds expressions for several objects of one scene, never for all of it.

    Every property that an expression names is needed: without it, the sentence would name other objects. So is its
    place or relation.
    """

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self._scene = scene
        self._rng = rng
        looks = {
            Description(**{name: getattr(item, name) for name in names}) for item in scene.objects for names in SUBSETS
        }
        fitting = {look: sum(map(look.fits, scene.objects)) for look in sorted(looks, key=repr)}
        self._looks = {look: count for look, count in fitting.items() if count >= 2}

    def find(self, kind: str) -> tuple[frozenset[int], Expression] | None:
        """An unambiguous expression of `kind` with its words and the objects that it names; None if none is found."""
        for candidate in getattr(self, f"_{kind}s")():
            named = describes(self._scene, candidate)
            if not 2 <= len(named) < len(self._scene.objects) or not is_unambiguous(self._scene, candidate):
                continue
            if kind != "pair":
                if not self._is_needed(candidate, named):
                    continue
                if self._rng.random() < _COUNT_SHARE:
                    candidate = replace(candidate, count=len(named))
            candidate = replace(candidate, parts=word_expression(candidate, self._rng))
            if len(candidate.text.split()) <= MAX_WORDS:
                return frozenset(named), candidate
        return None

    def _is_needed(self, candidate: Expression, named: set[int]) -> bool:
        """Whether the sentence would name other objects without any one of its properties, or without its place."""
        if candidate.kind != "attribute" and self._looks[candidate.target] == len(named):
            return False
        shorter = (
            replace(candidate, target=replace(candidate.target, **{name: None})) for name in candidate.target.named()
        )
        return all(describes(self._scene, one) != named for one in shorter)

    def _attributes(self) -> Iterator[Expression]:
        for look in self._rng.sample(list(self._looks), len(self._looks)):
            yield Expression("attribute", look, several=True)

    def _places(self) -> Iterator[Expression]:
        frames = [(place, None) for place in _PLACES]
        frames += [(place, count) for place in EXTREMES for count in _COUNTS]
        for look, (place, count) in self._shuffled(frames):
            yield Expression("place", look, place=place, several=True, count=count)

    def _relations(self) -> Iterator[Expression]:
        search = ExpressionSearch(self._scene, self._rng)
        anchors = [one for one in map(search.alone, range(len(self._scene.objects))) if one is not None]
        relations: list[tuple[str, int | None]] = [(relation, None) for relation in (*RELATIONS[:4], "next to")]
        relations += [(relation, count) for relation in ("closest to", "farthest from") for count in _COUNTS]
        frames = [(relation, count, anchor) for relation, count in relations for anchor in anchors]
        for look, (relation, count, anchor) in self._shuffled(frames):
            yield Expression("relation", look, relation=relation, anchor=anchor, several=True, count=count)

    def _pairs(self) -> Iterator[Expression]:
        search = ExpressionSearch(self._scene, self._rng)
        alone = [one for one in map(search.alone, range(len(self._scene.objects))) if one is not None]
        pairs = [(first, second) for first in alone for second in alone if first is not second]
        for first, second in self._rng.sample(pairs, len(pairs)):
            yield Expression("pair", first, second=second, several=True)

    def _shuffled(self, frames: list) -> Iterator[tuple[Description, tuple]]:
        """Every look that more than two objects have with every frame, in random order."""
        looks = [look for look, count in self._looks.items() if count >= 3]
        pairs = [(look, frame) for frame in frames for look in looks]
        yield from self._rng.sample(pairs, len(pairs))
