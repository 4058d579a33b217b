"""What a sentence about an embedded scene means: its structure and the objects that it may describe.

`describes` knows nothing of how a sentence was found. It answers which objects of a scene a reader could take
an expression for, strictly or generously. An expression is unambiguous if both answers are the same, one object or
as many as the sentence names; it names nothing if even the generous answer is empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from magnet_fast.data.scenes.drawing import Scene, SceneObject

KINDS = ("attribute", "place", "order", "relation", "pair")
PROPERTIES = ("shape", "colour", "size", "texture")
SIDES = ("left", "right", "top", "bottom")
HALVES = SIDES
CORNERS = ("top left", "top right", "bottom left", "bottom right")
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost")
PLACES = (*HALVES, *CORNERS, *EXTREMES, "middle")
RELATIONS = ("left of", "right of", "above", "below", "closest to", "farthest from", "next to")

MARGIN = 0.055  # of the image side: 7 pixels of 128. What differs by less is not told apart.
MIDDLE = 0.16  # half side of the central square called "the middle"
NEXT_TO = 0.36  # centre distance called "next to"
WIDE = 3.0  # how many times farther to the side than up a reader may still call "above"

_EXTREME_SIDE = dict(zip(EXTREMES, SIDES, strict=True))
_RELATION_SIDE = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}


@dataclass(frozen=True)
class Description:
    """Named properties of an object; None where the phrase does not name one."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None

    def fits(self, item: SceneObject) -> bool:
        return (
            (self.shape is None or self.shape == item.shape)
            and (self.colour is None or self.colour == item.colour)
            and (self.size is None or self.size == item.size)
            and (self.texture is None or self.texture == item.texture)
        )

    def named(self) -> tuple[str, ...]:
        """Names of the properties that the phrase mentions."""
        return tuple(name for name in PROPERTIES if getattr(self, name) is not None)


@dataclass(frozen=True)
class Part:
    """A phrase of a sentence and what it says: a property, "place", "rank", "relation", "anchor colour", …"""

    slot: str
    phrase: str


@dataclass(frozen=True)
class Expression:
    """Meaning and wording of one sentence.

    kind "attribute": `target` alone. "place": also `place`. "order": also `rank` (1 = first) counted from
    `side`. "relation": also `relation` to the one object that `anchor` describes. "pair": the one object that
    `target` describes and the one that `second` describes.

    `several`: the sentence names several objects, all that fit; `count` is their number where the sentence says it,
    as it must with what is farthest to a side, closest or farthest ("the two leftmost circles"). `changed`: what a
    sentence that names nothing has changed of one that names something, in the words of `Expression.label`.
    """

    kind: str
    target: Description
    place: str | None = None
    rank: int | None = None
    side: str | None = None
    relation: str | None = None
    anchor: Description | None = None
    second: Description | None = None
    several: bool = False
    count: int | None = None
    changed: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def text(self) -> str:
        """The sentence, in lower case."""
        return " ".join(part.phrase for part in self.parts)

    @property
    def label(self) -> str:
        """Kind as the files say it: `kind`, "several/" and `kind`, or "absent/" and what was changed.

        Changed is one of the four properties, "place", "rank", "relation", or "anchor" (a property of the anchor).
        """
        if self.changed is not None:
            return f"absent/{self.changed}"
        return f"several/{self.kind}" if self.several else self.kind


def describes(scene: Scene, expression: Expression, *, slack: float = MARGIN, wide: float = WIDE) -> set[int]:
    """Indices of the objects that the expression describes.

    slack > 0 answers generously: every object that a reader might mean, comparisons failing by less than
    `slack` counted as true. slack < 0 answers strictly: only objects for which every comparison holds by at
    least -`slack`. Units: fractions of the image side. `wide`: how many times farther to the side than up the generous
    answer may still call "above".
    """
    candidates = [i for i, item in enumerate(scene.objects) if expression.target.fits(item)]
    if expression.kind == "attribute":
        return set(candidates)
    if expression.kind == "pair":
        return {*candidates, *(i for i, item in enumerate(scene.objects) if expression.second.fits(item))}
    many = expression.count or 1
    if expression.kind == "place":
        if expression.place in _EXTREME_SIDE:
            keys = {i: _from_side(scene.objects[i], _EXTREME_SIDE[expression.place]) for i in candidates}
            return {i for i in candidates if _may_lead(keys, i, many, slack)}
        return {i for i in candidates if _place_surplus(scene.objects[i], expression.place) >= -slack}
    if expression.kind == "order":
        keys = {i: _from_side(scene.objects[i], expression.side) for i in candidates}
        return {i for i in candidates if _may_rank(keys, i, expression.rank, slack)}
    if expression.kind != "relation":
        raise ValueError(f"expression.kind is {expression.kind!r}; expected one of {', '.join(KINDS)}")
    anchors = [i for i, item in enumerate(scene.objects) if expression.anchor.fits(item)]
    found: set[int] = set()
    for anchor in anchors:
        others = [i for i in candidates if i != anchor]
        found |= _related(scene, expression.relation, anchor, others, many, slack, wide)
    return found


def is_unambiguous(scene: Scene, expression: Expression) -> bool:
    """Whether generous and strict reading are the same, of the right number, and the anchor is one object.

    The right number is one, or for several objects `expression.count`, or at least two where the sentence says none.
    Each half of a pair names one. "All above" may well mean anything higher, however far aside.
    """
    strict = describes(scene, expression, slack=-MARGIN)
    if strict != describes(scene, expression, slack=MARGIN, wide=math.inf if expression.several else WIDE):
        return False
    if expression.kind == "pair":
        halves = (expression.target, expression.second)
        return len(strict) == 2 and all(_number(scene, half) == 1 for half in halves)
    if expression.several and (len(strict) < 2 or expression.count not in (None, len(strict))):
        return False
    if not expression.several and len(strict) != 1:
        return False
    return expression.anchor is None or _number(scene, expression.anchor) == 1


def names_nothing(scene: Scene, expression: Expression) -> bool:
    """Whether no object fits even generously, "above" taken for anything higher, and the anchor is not several."""
    if describes(scene, expression, slack=MARGIN, wide=math.inf):
        return False
    return expression.anchor is None or _number(scene, expression.anchor) <= 1


def _number(scene: Scene, description: Description) -> int:
    return sum(map(description.fits, scene.objects))


def _from_side(item: SceneObject, side: str) -> float:
    return {"left": item.x, "right": 1.0 - item.x, "top": item.y, "bottom": 1.0 - item.y}[side]


def _place_surplus(item: SceneObject, place: str) -> float:
    """How far inside the named area the centre lies; negative outside."""
    if place == "middle":
        return MIDDLE - max(abs(item.x - 0.5), abs(item.y - 0.5))
    return min(0.5 - _from_side(item, side) for side in place.split())


def _may_rank(keys: dict[int, float], index: int, rank: int, slack: float) -> bool:
    """Whether `index` is the `rank`-th smallest, when keys closer than |slack| may stand in either order."""
    others = [key - keys[index] for i, key in keys.items() if i != index]
    surely_before = sum(difference < -abs(slack) for difference in others)
    maybe_before = sum(difference < abs(slack) for difference in others)
    if slack < 0:
        return surely_before == maybe_before == rank - 1
    return surely_before <= rank - 1 <= maybe_before


def _may_lead(keys: dict[int, float], index: int, count: int, slack: float) -> bool:
    """Whether `index` is among the `count` smallest, when keys closer than |slack| may stand in either order."""
    others = [key - keys[index] for i, key in keys.items() if i != index]
    return sum(difference < -slack for difference in others) < count


def _related(
    scene: Scene, relation: str, anchor: int, candidates: list[int], count: int, slack: float, wide: float
) -> set[int]:
    origin = scene.objects[anchor]
    if relation in _RELATION_SIDE:
        side = _RELATION_SIDE[relation]
        found = set()
        for i in candidates:
            item = scene.objects[i]
            ahead = _from_side(origin, side) - _from_side(item, side)
            aside = abs(item.y - origin.y) if side in ("left", "right") else abs(item.x - origin.x)
            # A careful speaker says "above" only of what lies within 45 degrees of straight up; a reader may
            # take it for anything higher, unless it lies far more to the side.
            if ahead >= -slack and aside <= (wide * (ahead + slack) if slack > 0 else ahead):
                found.add(i)
        return found
    distances = {i: math.hypot(scene.objects[i].x - origin.x, scene.objects[i].y - origin.y) for i in candidates}
    if relation == "closest to":
        return {i for i in candidates if _may_lead(distances, i, count, slack)}
    if relation == "farthest from":
        away = {i: -distance for i, distance in distances.items()}
        return {i for i in candidates if _may_lead(away, i, count, slack)}
    if relation == "next to":
        return {i for i in candidates if distances[i] <= NEXT_TO + slack}
    raise ValueError(f"expression.relation is {relation!r}; expected one of {', '.join(RELATIONS)}")
