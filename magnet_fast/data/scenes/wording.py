"""Words for the meaning of an expression: templates and synonyms, chosen at random."""

from __future__ import annotations

import random

from magnet_fast.data.scenes.expressions import EXTREMES, SIDES, Description, Expression, Part

SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "cross": ("cross", "cross", "plus"),
    "moon": ("moon", "moon", "crescent"),
    "box": ("box", "box", "rectangle"),
    "drop": ("drop", "drop", "teardrop"),
    "ring": ("ring", "ring", "ring", "donut"),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "big")}
TEXTURE_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "checkered": ("checkered", "checkered", "checked"),
}
TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
_ANY_OBJECT = ("object", "shape", "thing")
_RANK_WORDS = {2: "second", 3: "third", 4: "fourth"}

PLURALS = {  # as far as the vocabulary holds the words
    "circle": ("circles",),
    "square": ("squares",),
    "triangle": ("triangles",),
    "star": ("stars",),
    "diamond": ("diamonds",),
    "cross": ("crosses",),
    "ring": ("rings", "rings", "donuts"),
    "heart": ("hearts",),
    "arrow": ("arrows",),
    "moon": ("moons",),
    "box": ("boxes",),
    "drop": ("drops",),
}
_ANY_OBJECTS = ("objects", "shapes", "things")
_NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}

# * stands for the description without article.
_PLACE_TEMPLATES = {
    "left": ("* on the left", "* on the left side", "left *", "* to the left"),
    "right": ("* on the right", "* on the right side", "right *", "* to the right"),
    "top": ("* at the top", "* in the upper half", "upper *", "top *"),
    "bottom": ("* at the bottom", "* in the lower half", "lower *", "bottom *"),
    "middle": ("* in the middle", "* in the center", "middle *", "center *"),
    "leftmost": ("leftmost *", "* on the far left", "* farthest to the left"),
    "rightmost": ("rightmost *", "* on the far right", "* farthest to the right"),
    "topmost": ("highest *", "topmost *", "* at the very top"),
    "bottommost": ("lowest *", "bottommost *", "* at the very bottom"),
}
_CORNER_TEMPLATES = (
    "* in the {vertical} {horizontal} corner",
    "* in the {vertical} {horizontal}",
    "{vertical} {horizontal} *",
    "* at the {vertical} {horizontal}",
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


def word_expression(expression: Expression, rng: random.Random) -> tuple[Part, ...]:
    """The phrases of a sentence in lower case for an expression's meaning."""
    if expression.several:
        return _word_several(expression, rng)
    the = _article(rng.random() < 0.7)
    noun = _noun_phrase(expression.target, rng, tail_fits=expression.kind == "attribute")
    if expression.kind == "attribute":
        return the + noun
    if expression.kind == "place":
        before, after = _place_phrases(expression.place, rng)
        return the + _part("place", before) + noun + _part("place", after)
    if expression.kind == "order":
        start = rng.choice(("from", "from", "counting from"))
        rank = _part("rank", _RANK_WORDS[expression.rank])
        return the + rank + noun + _part("side", f"{start} the {expression.side}")
    return the + noun + _relation_phrases(expression, rng, definite=bool(the))


def reword(expression: Expression, slot: str, rng: random.Random) -> tuple[Part, ...]:
    """The same sentence once the meaning of one slot is another: only that slot's phrase is replaced.

    `expression` has the new meaning and the old parts. The new phrase stands on the same side of the noun. Returns no
    parts where the new meaning has no phrase for that side (there is no "with plain" in place of "with dots").
    """
    position = next(i for i, part in enumerate(expression.parts) if part.slot == slot)
    old = expression.parts[position].phrase
    of_anchor, name = slot.startswith("anchor "), slot.removeprefix("anchor ")
    holder = expression if name in ("place", "relation", "rank") else expression.target
    value = getattr(expression.anchor if of_anchor else holder, name)
    if name == "place":
        before_noun = position < next(i for i, part in enumerate(expression.parts) if part.slot == "shape")
        phrases = [before if before_noun else after for before, after in _all_place_phrases(value)]
    elif name == "relation":
        phrases = _RELATION_WORDS[value]
    elif name == "rank":
        phrases = (_RANK_WORDS[value],)
    elif name == "shape":
        phrases = _nouns(value, several=expression.several and not of_anchor)
    elif name == "texture":
        tail = TEXTURE_TAILS.get(value, "")
        phrases = (tail,) if old.startswith("with ") else TEXTURE_WORDS[value]
    else:
        phrases = SIZE_WORDS[value] if name == "size" else (value,)
    phrases = [phrase for phrase in phrases if phrase]
    if not phrases:
        return ()
    return (*expression.parts[:position], Part(slot, rng.choice(phrases)), *expression.parts[position + 1 :])


def _word_several(expression: Expression, rng: random.Random) -> tuple[Part, ...]:
    if expression.kind == "pair":
        the = _article(rng.random() < 0.7)
        first, second = (
            _noun_phrase(half, rng, tail_fits=False, prefix=prefix)
            for half, prefix in ((expression.target, ""), (expression.second, "second "))
        )
        return the + first + _part("and", "and the" if the else "and") + second
    noun = _noun_phrase(expression.target, rng, tail_fits=expression.kind == "attribute", several=True)
    if expression.kind == "place" and expression.place in EXTREMES:
        the = _article(rng.random() < 0.8)
        number = _NUMBER_WORDS[expression.count]
        if rng.random() < 0.3:
            side = SIDES[EXTREMES.index(expression.place)]
            return the + _part("place", f"first {number}") + noun + _part("side", f"from the {side}")
        before, after = _place_phrases(expression.place, rng)
        return the + _part("count", number) + _part("place", before) + noun + _part("place", after)
    superlative = expression.relation in ("closest to", "farthest from")
    start = _part("count", rng.choice(_quantifiers(expression.count, superlative)))
    if expression.kind == "attribute":
        return start + noun
    if expression.kind == "place":  # "the two left circles" would be read as the two farthest to the left
        after = rng.choice([after for _, after in _all_place_phrases(expression.place) if after])
        return start + noun + _part("place", after)
    return start + noun + _relation_phrases(expression, rng, definite=True)


def _quantifiers(count: int | None, superlative: bool) -> tuple[str, ...]:
    if count is None:
        return ("all", "all the", "the", "the", "")
    number = _NUMBER_WORDS[count]
    if superlative:
        return (f"the {number}", f"the {number}", number)
    return (f"the {number}", f"the {number}", number, "both" if count == 2 else f"all {number}")


def _relation_phrases(expression: Expression, rng: random.Random, *, definite: bool) -> tuple[Part, ...]:
    the = _article(definite or rng.random() < 0.5, prefix="anchor ")
    anchor = _noun_phrase(expression.anchor, rng, tail_fits=True, prefix="anchor ")
    return _part("relation", rng.choice(_RELATION_WORDS[expression.relation])) + the + anchor


def _place_phrases(place: str, rng: random.Random) -> tuple[str, str]:
    """Words before and after the noun; one of the two is empty."""
    vertical, _, horizontal = place.partition(" ")
    template = rng.choice(_CORNER_TEMPLATES if horizontal else _PLACE_TEMPLATES[place])
    if horizontal:
        template = template.format(vertical=rng.choice(_VERTICAL_WORDS[vertical]), horizontal=horizontal)
    return _around_noun(template)


def _all_place_phrases(place: str) -> list[tuple[str, str]]:
    vertical, _, horizontal = place.partition(" ")
    if not horizontal:
        return [_around_noun(template) for template in _PLACE_TEMPLATES[place]]
    return [
        _around_noun(template.format(vertical=word, horizontal=horizontal))
        for template in _CORNER_TEMPLATES
        for word in _VERTICAL_WORDS[vertical]
    ]


def _around_noun(template: str) -> tuple[str, str]:
    before, after = template.split("*")
    return before.strip(), after.strip()


def _noun_phrase(
    description: Description, rng: random.Random, *, tail_fits: bool, several: bool = False, prefix: str = ""
) -> tuple[Part, ...]:
    """`tail_fits`: whether "with dots" may follow; "with dots on the left" would be ambiguous."""
    noun = _part(f"{prefix}shape", rng.choice(_nouns(description.shape, several=several)))
    size = _part(f"{prefix}size", rng.choice(SIZE_WORDS[description.size]) if description.size else "")
    colour = _part(f"{prefix}colour", description.colour or "")
    texture, tail = (), ()
    if tail_fits and description.texture in TEXTURE_TAILS and rng.random() < 0.25:
        tail = _part(f"{prefix}texture", TEXTURE_TAILS[description.texture])
    elif description.texture:
        texture = _part(f"{prefix}texture", rng.choice(TEXTURE_WORDS[description.texture]))
    middle = texture + colour if rng.random() < 0.3 else colour + texture
    return size + middle + noun + tail


def _nouns(shape: str | None, *, several: bool) -> tuple[str, ...]:
    if shape is None:
        return _ANY_OBJECTS if several else _ANY_OBJECT
    return PLURALS[shape] if several else SHAPE_WORDS.get(shape, (shape,))


def _article(definite: bool, prefix: str = "") -> tuple[Part, ...]:
    return _part(f"{prefix}article", "the" if definite else "")


def _part(slot: str, phrase: str) -> tuple[Part, ...]:
    return (Part(slot, phrase),) if phrase else ()
