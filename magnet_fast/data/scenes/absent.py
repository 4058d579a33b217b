"""Sentences that name nothing: a true sentence of the scene with one property, place, rank or relation changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from magnet_fast.data.scenes.drawing import COLOURS, SHAPES, SIZES, TEXTURES, Scene
from magnet_fast.data.scenes.expressions import (
    CORNERS,
    EXTREMES,
    HALVES,
    PROPERTIES,
    RELATIONS,
    Description,
    Expression,
    names_nothing,
)
from magnet_fast.data.scenes.search import MAX_WORDS
from magnet_fast.data.scenes.wording import reword

_RANGES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "texture": TEXTURES}
_PLACES = (*HALVES, *CORNERS, "middle")  # something is always farthest to a side
_RANKS = (2, 3, 4)
_LOOK_ALIKES = {"box": "square", "circle": "ring"}  # a square is a rectangle as well, a ring a circle
_SEEN_SHARE = 0.8  # of the changes, to something that the scene shows elsewhere, where there is such a change


def absent_expressions(
    scene: Scene, expressions: tuple[Expression, ...], number: int, rng: random.Random
) -> tuple[Expression, ...]:
    """Up to `number` different sentences that name nothing, each one change away from one of `expressions`.

    What is changed is drawn first, then how, so that the rarer changes get their share; and mostly to what the scene
    shows elsewhere, so that looking for each word alone does not tell. The evaluator proves that nothing fits, even
    generously (`expressions.names_nothing`).
    """
    changes: dict[str, list[tuple[bool, Expression]]] = {}
    for expression in expressions:
        for slot in dict.fromkeys(part.slot for part in expression.parts):
            for seen, changed in _changes(scene, expression, slot):
                if _is_absent(scene, changed):
                    changed = replace(changed, parts=reword(changed, slot, rng))
                    if changed.parts and len(changed.text.split()) <= MAX_WORDS:
                        changes.setdefault(changed.changed, []).append((seen, changed))
    found: dict[str, Expression] = {}
    while len(found) < number and changes:
        wanted = rng.random() < _SEEN_SHARE
        kinds = [what for what, choices in changes.items() if any(seen == wanted for seen, _ in choices)]
        what = rng.choice(kinds or list(changes))
        chosen = rng.choice([one for seen, one in changes[what] if seen == wanted or not kinds])
        changes[what] = [(seen, one) for seen, one in changes[what] if one.text != chosen.text]
        if not changes[what]:
            del changes[what]
        found.setdefault(chosen.text, chosen)
    return tuple(found.values())


def _changes(scene: Scene, expression: Expression, slot: str) -> Iterator[tuple[bool, Expression]]:
    """Every other meaning of one slot, still with the old words, and whether the scene shows what it speaks of."""
    of_anchor, name = slot.startswith("anchor "), slot.removeprefix("anchor ")
    described = expression.anchor if of_anchor else expression.target
    if name in PROPERTIES and getattr(described, name) is not None:
        shown = {getattr(item, name) for item in scene.objects}
        for value in _RANGES[name]:
            if value != getattr(described, name):
                other = {"anchor" if of_anchor else "target": replace(described, **{name: value})}
                yield value in shown, replace(expression, changed="anchor" if of_anchor else name, **other)
    elif slot == "place" and not (expression.several and expression.place in EXTREMES):
        for place in _PLACES:
            if place != expression.place:
                yield True, replace(expression, place=place, changed="place")
    elif slot == "rank":
        for rank in _RANKS:
            if rank != expression.rank:
                yield True, replace(expression, rank=rank, changed="rank")
    elif slot == "relation":
        for relation in RELATIONS:
            if relation != expression.relation:
                yield True, replace(expression, relation=relation, changed="relation")


def _is_absent(scene: Scene, changed: Expression) -> bool:
    """Whether nothing fits, even where a square is taken for a rectangle or a ring for a circle."""
    if changed.anchor is not None and changed.anchor == changed.target:
        return False  # "the red star left of the red star" says nothing
    targets = _readings(changed.target)
    slots = [part.slot for part in changed.parts]
    if "place" in slots and slots.index("place") < slots.index("shape"):
        # "The left star" may also be the leftmost of several, wherever they are: no star may be there at all.
        return not any(target.fits(item) for target in targets for item in scene.objects)
    anchors = _readings(changed.anchor) if changed.anchor is not None else [None]
    return all(
        names_nothing(scene, replace(changed, target=target, anchor=anchor)) for target in targets for anchor in anchors
    )


def _readings(description: Description) -> list[Description]:
    like = _LOOK_ALIKES.get(description.shape)
    return [description] if like is None else [description, replace(description, shape=like)]
