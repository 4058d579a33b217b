"""Words for the meaning of an expression: templates and synonyms, chosen at random."""

from __future__ import annotations

import random

from magnet_fast.data.scene_expressions import Description, Expression

_SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "cross": ("cross", "cross", "plus"),
    "moon": ("moon", "moon", "crescent"),
    "box": ("box", "box", "rectangle"),
    "drop": ("drop", "drop", "teardrop"),
    "ring": ("ring", "ring", "ring", "donut"),
}
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "big")}
_TEXTURE_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "checkered": ("checkered", "checkered", "checked"),
}
_TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
_ANY_OBJECT = ("object", "shape", "thing")
_RANK_WORDS = {2: "second", 3: "third", 4: "fourth"}

# {the} stands for an article that may be left out, {noun} for the description without article.
_PLACE_TEMPLATES = {
    "left": (
        "{the}{noun} on the left",
        "{the}{noun} on the left side",
        "{the}left {noun}",
        "{the}{noun} to the left",
    ),
    "right": (
        "{the}{noun} on the right",
        "{the}{noun} on the right side",
        "{the}right {noun}",
        "{the}{noun} to the right",
    ),
    "top": (
        "{the}{noun} at the top",
        "{the}{noun} in the upper half",
        "{the}upper {noun}",
        "{the}top {noun}",
    ),
    "bottom": (
        "{the}{noun} at the bottom",
        "{the}{noun} in the lower half",
        "{the}lower {noun}",
        "{the}bottom {noun}",
    ),
    "middle": (
        "{the}{noun} in the middle",
        "{the}{noun} in the center",
        "{the}middle {noun}",
        "{the}center {noun}",
    ),
    "leftmost": ("{the}leftmost {noun}", "{the}{noun} on the far left", "{the}{noun} farthest to the left"),
    "rightmost": (
        "{the}rightmost {noun}",
        "{the}{noun} on the far right",
        "{the}{noun} farthest to the right",
    ),
    "topmost": ("{the}highest {noun}", "{the}topmost {noun}", "{the}{noun} at the very top"),
    "bottommost": ("{the}lowest {noun}", "{the}bottommost {noun}", "{the}{noun} at the very bottom"),
}
_CORNER_TEMPLATES = (
    "{the}{noun} in the {vertical} {horizontal} corner",
    "{the}{noun} in the {vertical} {horizontal}",
    "{the}{vertical} {horizontal} {noun}",
    "{the}{noun} at the {vertical} {horizontal}",
)
_VERTICAL_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "under", "beneath"),
    "closest to": ("closest to", "nearest to", "nearest"),
    "farthest from": ("farthest from", "furthest from", "farthest away from"),
    "next to": ("next to", "beside", "near", "close to"),
}


def word_expression(expression: Expression, rng: random.Random) -> str:
    """A sentence in lower case for an expression's meaning."""
    the = "the " if rng.random() < 0.7 else ""
    noun = _noun_phrase(expression.target, rng, tail_fits=expression.kind == "attribute")
    if expression.kind == "attribute":
        return the + noun
    if expression.kind == "place":
        vertical, _, horizontal = expression.place.partition(" ")
        if horizontal:
            template = rng.choice(_CORNER_TEMPLATES)
            return template.format(
                the=the, noun=noun, vertical=rng.choice(_VERTICAL_WORDS[vertical]), horizontal=horizontal
            )
        return rng.choice(_PLACE_TEMPLATES[expression.place]).format(the=the, noun=noun)
    if expression.kind == "order":
        start = rng.choice(("from", "from", "counting from"))
        return f"{the}{_RANK_WORDS[expression.rank]} {noun} {start} the {expression.side}"
    anchor = ("the " if the or rng.random() < 0.5 else "") + _noun_phrase(expression.anchor, rng, tail_fits=True)
    return f"{the}{noun} {rng.choice(_RELATION_WORDS[expression.relation])} {anchor}"


def _noun_phrase(description: Description, rng: random.Random, *, tail_fits: bool) -> str:
    """`tail_fits`: whether "with dots" may follow; "with dots on the left" would be ambiguous."""
    shape = description.shape
    noun = rng.choice(_SHAPE_WORDS.get(shape, (shape,))) if shape else rng.choice(_ANY_OBJECT)
    size = [rng.choice(_SIZE_WORDS[description.size])] if description.size else []
    colour = [description.colour] if description.colour else []
    texture, tail = [], []
    if tail_fits and description.texture in _TEXTURE_TAILS and rng.random() < 0.25:
        tail = [_TEXTURE_TAILS[description.texture]]
    elif description.texture:
        texture = [rng.choice(_TEXTURE_WORDS[description.texture])]
    middle = texture + colour if rng.random() < 0.3 else colour + texture
    return " ".join([*size, *middle, noun, *tail])
