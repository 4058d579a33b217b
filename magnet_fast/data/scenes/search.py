"""Search for unambiguous expressions about single objects of a scene.

Candidates are tried on bit sets (bit i = object i), since one scene takes hundreds of trials. Each expression
found is then confirmed by `expressions.is_unambiguous`, which shares no code with the search.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from magnet_fast.data.scenes.drawing import Scene
from magnet_fast.data.scenes.expressions import (
    CORNERS,
    EXTREMES,
    HALVES,
    MARGIN,
    MIDDLE,
    NEXT_TO,
    PROPERTIES,
    RELATIONS,
    SIDES,
    WIDE,
    Description,
    Expression,
    is_unambiguous,
)
from magnet_fast.data.scenes.wording import word_expression

MAX_WORDS = 12
_EXTRA_SHARE = 0.2  # of the expressions, that may name one property more than they need
SUBSETS = tuple(
    tuple(name for bit, name in enumerate(PROPERTIES) if code >> bit & 1) for code in range(1 << len(PROPERTIES))
)
_SLACK = MARGIN + 1e-9  # a hair stricter than the checker, so that rounding never makes the two disagree
_PLACE_GROUPS = (HALVES, HALVES, CORNERS, CORNERS, EXTREMES, ("middle",))
_RELATION_GROUPS = (RELATIONS[:4], ("closest to", "next to"), ("farthest from",))


@dataclass(frozen=True)
class _Frame:
    """What an expression says besides the description of its target."""

    domain: int  # set of objects among which the target is sought
    at_least: int  # how many of them must fit the description, so that the frame itself is needed
    unique: Callable[[int], bool]  # whether the target is the only one meant, given the set that fits
    fields: dict  # Expression's fields


class ExpressionSearch:
    """Finds expressions for the objects of one scene.

    Every property that an expression names is needed (without it, another object could be meant), except that
    one in five expressions may name one property more; a place or relation is used only among at least two
    objects of the same description, an order only among at least three.
    """

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene = scene
        self._rng = rng
        self._all = (1 << len(scene.objects)) - 1
        self._same = {  # property -> per object: the set of objects that share its value
            name: [_set(getattr(b, name) == getattr(a, name) for b in scene.objects) for a in scene.objects]
            for name in PROPERTIES
        }
        self._keys = {  # distance from each side
            "left": [item.x for item in scene.objects],
            "right": [1.0 - item.x for item in scene.objects],
            "top": [item.y for item in scene.objects],
            "bottom": [1.0 - item.y for item in scene.objects],
        }
        self._before = {side: [_predecessors(keys, i) for i in range(len(keys))] for side, keys in self._keys.items()}

    def find(self, kind: str, index: int) -> Expression | None:
        """An unambiguous expression of `kind` for object `index`, with its words; None if there is none."""
        extra = int(self._rng.random() < _EXTRA_SHARE)
        for frame in getattr(self, f"_{kind}_frames")(index):
            for names in self._rng.sample(SUBSETS, len(SUBSETS)):
                if not self._is_needed(index, names, frame, extra):
                    continue
                found = Expression(kind, self._description(index, names), **frame.fields)
                found = replace(found, parts=word_expression(found, self._rng))
                if len(found.text.split()) <= MAX_WORDS and is_unambiguous(self.scene, found):
                    return found
        return None

    def alone(self, index: int) -> Description | None:
        """A description of object `index` alone, no property to spare; None if another object looks the same."""
        (frame,) = self._attribute_frames(index)
        for names in self._rng.sample(SUBSETS, len(SUBSETS)):
            if self._is_needed(index, names, frame, 0):
                return self._description(index, names)
        return None

    def _is_needed(self, index: int, names: tuple[str, ...], frame: _Frame, extra: int) -> bool:
        """Whether the description singles the object out in the frame and at most `extra` of it is spare."""
        fits = self._fits(index, names) & frame.domain
        if fits.bit_count() < frame.at_least or not frame.unique(fits):
            return False
        spare = sum(
            frame.unique(self._fits(index, tuple(other for other in names if other != name)) & frame.domain)
            for name in names
        )
        return spare <= extra and (frame.at_least > 1 or spare < len(names))

    # --- frames of each kind, in random order

    def _attribute_frames(self, index: int) -> Iterator[_Frame]:
        yield _Frame(self._all, 1, lambda fits: fits == 1 << index, {})

    def _place_frames(self, index: int) -> Iterator[_Frame]:
        for group in self._rng.sample(_PLACE_GROUPS, len(_PLACE_GROUPS)):
            for place in self._rng.sample(group, len(group)):
                if place in EXTREMES:
                    unique = self._ranker(index, SIDES[EXTREMES.index(place)], 1)
                else:
                    surplus = self._place_surplus(place)
                    if surplus[index] < _SLACK:
                        continue
                    unique = _picker(index, _set(value > -_SLACK for value in surplus))
                yield _Frame(self._all, 2, unique, {"place": place})

    def _order_frames(self, index: int) -> Iterator[_Frame]:
        frames = [(side, rank) for side in SIDES for rank in (2, 3, 4)]
        for side, rank in self._rng.sample(frames, len(frames)):
            yield _Frame(self._all, 3, self._ranker(index, side, rank), {"rank": rank, "side": side})

    def _relation_frames(self, index: int) -> Iterator[_Frame]:
        anchors = [(i, self.alone(i)) for i in range(len(self.scene.objects)) if i != index]
        anchors = [(i, described) for i, described in anchors if described is not None]
        # A nearest or farthest object exists nearly always, one clearly above another less often: the sides
        # go first three times in four, so that they are not crowded out.
        groups = self._rng.sample(_RELATION_GROUPS, len(_RELATION_GROUPS))
        if self._rng.random() < 0.75:
            groups.sort(key=lambda group: group is not _RELATION_GROUPS[0])
        for group in groups:
            pairs = [(relation, *anchor) for relation in group for anchor in anchors]
            for relation, anchor, described in self._rng.sample(pairs, len(pairs)):
                unique = self._relative(index, anchor, relation)
                if unique is not None:
                    fields = {"relation": relation, "anchor": described}
                    yield _Frame(self._all & ~(1 << anchor), 2, unique, fields)

    # --- pieces

    def _fits(self, index: int, names: Iterable[str]) -> int:
        fits = self._all
        for name in names:
            fits &= self._same[name][index]
        return fits

    def _description(self, index: int, names: Iterable[str]) -> Description:
        return Description(**{name: getattr(self.scene.objects[index], name) for name in names})

    def _ranker(self, index: int, side: str, rank: int) -> Callable[[int], bool]:
        surely, maybe = self._before[side][index]
        return lambda fits: (fits & surely).bit_count() == (fits & maybe).bit_count() == rank - 1

    def _place_surplus(self, place: str) -> list[float]:
        if place == "middle":
            return [MIDDLE - max(abs(item.x - 0.5), abs(item.y - 0.5)) for item in self.scene.objects]
        return [0.5 - max(keys) for keys in zip(*(self._keys[side] for side in place.split()), strict=True)]

    def _relative(self, index: int, anchor: int, relation: str) -> Callable[[int], bool] | None:
        """Uniqueness in this relation to the anchor; None if the object does not clearly stand in it."""
        items, origin = self.scene.objects, self.scene.objects[anchor]
        offsets = [(item.x - origin.x, item.y - origin.y) for item in items]
        if relation in RELATIONS[:4]:
            side = RELATIONS.index(relation)
            keys = self._keys[SIDES[side]]
            along = [keys[anchor] - key for key in keys]
            across = [abs(offset[1 if side < 2 else 0]) for offset in offsets]
            if along[index] < max(_SLACK, across[index]):
                return None
            maybe = (a > -_SLACK and c < WIDE * (a + _SLACK) for a, c in zip(along, across, strict=True))
            return _picker(index, _set(maybe))
        distances = [math.hypot(*offset) for offset in offsets]
        if relation == "next to":
            if distances[index] > NEXT_TO - _SLACK:
                return None
            return _picker(index, _set(distance < NEXT_TO + _SLACK for distance in distances))
        sign = 1.0 if relation == "closest to" else -1.0
        _, maybe = _predecessors([sign * distance for distance in distances], index)
        return lambda fits: fits & maybe == 0


def _picker(index: int, maybe: int) -> Callable[[int], bool]:
    return lambda fits: fits & maybe == 1 << index


def _set(members: Iterable[bool]) -> int:
    return sum(1 << i for i, member in enumerate(members) if member)


def _predecessors(keys: list[float], index: int) -> tuple[int, int]:
    """The objects that surely come before `index`, and those that may, when close keys are not told apart."""
    key = keys[index]
    return _set(other < key - _SLACK for other in keys), _set(
        other < key + _SLACK and i != index for i, other in enumerate(keys)
    )
