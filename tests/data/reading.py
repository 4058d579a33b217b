"""A reader of scene expressions that knows nothing of the generator: words and written annotations only.

It parses a sentence with its own small grammar, takes places from the annotations' boxes and answers with the
one annotation that a plain reading names. Tests compare that with the ref.
"""

from __future__ import annotations

import re
from typing import Any

WORDS = {
    "shape": {
        "circle": "circle disc",
        "square": "square",
        "triangle": "triangle",
        "star": "star",
        "diamond": "diamond",
        "cross": "cross plus",
        "ring": "ring donut",
        "heart": "heart",
        "arrow": "arrow",
        "moon": "moon crescent",
        "box": "box rectangle",
        "drop": "drop teardrop",
    },
    "colour": {name: name for name in ["red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan"]},
    "size": {"small": "small little tiny", "large": "large big"},
    "texture": {
        "plain": "plain solid",
        "striped": "striped stripy stripes",
        "dotted": "dotted spotted dots",
        "checkered": "checkered checked checks",
    },
}
MEANING = {
    word: (name, value) for name, values in WORDS.items() for value, words in values.items() for word in words.split()
}
FILLERS = {"the", "object", "shape", "thing", "with"}
RELATIONS = [
    ("left", r"(?:to the |on the )?left of"),
    ("right", r"(?:to the |on the )?right of"),
    ("above", r"above|over"),
    ("below", r"below|under|beneath"),
    ("closest", r"closest to|nearest to|nearest"),
    ("farthest", r"farthest away from|farthest from|furthest from"),
    ("near", r"next to|beside|near|close to"),
]
ORDER = re.compile(r"(second|third|fourth) (.*?) (?:counting )?from the (left|right|top|bottom)")
EXTREMES = [
    ("left", r"leftmost|on the far left|farthest to the left"),
    ("right", r"rightmost|on the far right|farthest to the right"),
    ("top", r"highest|topmost|at the very top"),
    ("bottom", r"lowest|bottommost|at the very bottom"),
]
HALVES = [
    ("left", r"on the left side|on the left|to the left|left"),
    ("right", r"on the right side|on the right|to the right|right"),
    ("top", r"at the top|in the upper half|upper|top"),
    ("bottom", r"at the bottom|in the lower half|lower|bottom"),
    ("middle", r"in the middle|in the center|middle|center"),
]
CORNER = re.compile(r"(?:(?:in|at) the )?(top|upper|bottom|lower) (left|right)(?: corner)?")
RANKS = {"second": 1, "third": 2, "fourth": 3}


def properties(words: str) -> dict[str, str]:
    """The properties that a noun phrase names; KeyError for a word that the grammar does not hold."""
    return dict(MEANING[word] for word in words.split() if word not in FILLERS)


def matching(words: str, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    named = properties(words)
    return [one for one in annotations if all(one["attributes"][name] == named[name] for name in named)]


def centre(annotation: dict[str, Any]) -> tuple[float, float]:
    left, top, width, height = annotation["bbox"]
    return left + width / 2, top + height / 2


def from_side(annotation: dict[str, Any], side: str) -> float:
    x, y = centre(annotation)
    return {"left": x, "right": -x, "top": y, "bottom": -y}[side]


def read(text: str, kind: str, annotations: list[dict[str, Any]], image_size: int) -> int:
    """The id of the annotation that the sentence names."""
    if kind == "attribute":
        (one,) = matching(text, annotations)
        return one["id"]
    if kind == "order":
        rank, words, side = ORDER.fullmatch(text.removeprefix("the ")).groups()
        return sorted(matching(words, annotations), key=lambda one: from_side(one, side))[RANKS[rank]]["id"]
    return read_place(text, annotations, image_size) if kind == "place" else read_relation(text, annotations)


def read_place(text: str, annotations: list[dict[str, Any]], image_size: int) -> int:
    for side, pattern in EXTREMES:
        if re.search(rf"\b(?:{pattern})\b", text):
            candidates = matching(re.sub(rf"\b(?:{pattern})\b", "", text), annotations)
            return min(candidates, key=lambda one: from_side(one, side))["id"]
    corner = CORNER.search(text)
    if corner:
        vertical, horizontal = corner.groups()
        x = 0 if horizontal == "left" else image_size
        y = 0 if vertical in ("top", "upper") else image_size
        candidates = matching(CORNER.sub("", text), annotations)
        inside = [one for one in candidates if max(abs(centre(one)[0] - x), abs(centre(one)[1] - y)) < image_size / 2]
        (one,) = inside
        return one["id"]
    side, pattern = next((side, p) for side, p in HALVES if re.search(rf"\b(?:{p})\b", text))
    candidates = matching(re.sub(rf"\b(?:{pattern})\b", "", text), annotations)
    middle = image_size / 2
    if side == "middle":
        return min(candidates, key=lambda one: max(abs(value - middle) for value in centre(one)))["id"]
    edge = middle if side in ("left", "top") else -middle
    (one,) = [one for one in candidates if from_side(one, side) < edge]
    return one["id"]


def read_relation(text: str, annotations: list[dict[str, Any]]) -> int:
    relation, match = next((name, m) for name, p in RELATIONS if (m := re.search(rf" (?:{p}) ", text)))
    (anchor,) = matching(text[match.end() :], annotations)
    candidates = [one for one in matching(text[: match.start()], annotations) if one is not anchor]
    x, y = centre(anchor)

    def offset(one: dict[str, Any]) -> tuple[float, float]:
        return centre(one)[0] - x, centre(one)[1] - y

    if relation in ("closest", "near", "farthest"):
        distances = [(dx * dx + dy * dy, one["id"]) for one in candidates for dx, dy in [offset(one)]]
        return (max if relation == "farthest" else min)(distances)[1]
    turned = {  # how far ahead in the named direction, how far aside
        "left": lambda dx, dy: (-dx, abs(dy)),
        "right": lambda dx, dy: (dx, abs(dy)),
        "above": lambda dx, dy: (-dy, abs(dx)),
        "below": lambda dx, dy: (dy, abs(dx)),
    }[relation]
    ahead = [(turned(*offset(one)), one["id"]) for one in candidates]
    # Of those ahead at all, the one most nearly straight ahead.
    return min((aside / forward, index) for (forward, aside), index in ahead if forward > 0)[1]
