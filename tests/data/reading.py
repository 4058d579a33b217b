"""A reader of scene expressions that knows nothing of the generator: words and written annotations only.

It parses a sentence with its own small grammar, takes places from the annotations' boxes and answers with the
one annotation that a plain reading names (`read`), or with all that may be meant (`all_named`). Tests compare that with
the ref.
"""

from __future__ import annotations

import math
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
FILLERS = {"the", "object", "shape", "thing", "with", "all", "both"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
NUMBER = re.compile(rf"\b(?:{'|'.join(NUMBERS)})\b")
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
    singular = [word if word in MEANING else re.sub(r"(?<=x)es$|(?<=ss)es$|s$", "", word) for word in words.split()]
    return dict(MEANING[word] for word in singular if word not in FILLERS)


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


def all_named(text: str, annotations: list[dict[str, Any]], image_size: int) -> set[int]:
    """Ids of all annotations that fit the sentence, whatever its kind: several, one or none."""
    count = NUMBERS[NUMBER.search(text).group()] if NUMBER.search(text) else 1
    words = NUMBER.sub("", text).removeprefix("the ").strip()
    first = re.fullmatch(r"first (.*) from the (left|right|top|bottom)", words)
    if first:
        return leading(matching(first[1], annotations), first[2], count)
    if " and " in words:
        return {one["id"] for half in words.split(" and ") for one in matching(half, annotations)}
    if order := ORDER.fullmatch(words):
        candidates = sorted(matching(order[2], annotations), key=lambda one: from_side(one, order[3]))
        return {one["id"] for one in candidates[RANKS[order[1]] : RANKS[order[1]] + 1]}
    for relation, pattern in RELATIONS:
        if match := re.search(rf" (?:{pattern}) ", words):
            candidates = matching(words[: match.start()], annotations)
            return related(relation, candidates, matching(words[match.end() :], annotations), count, image_size)
    return placed(words, annotations, count, image_size)


def leading(candidates: list[dict[str, Any]], side: str, count: int) -> set[int]:
    return {one["id"] for one in sorted(candidates, key=lambda one: from_side(one, side))[:count]}


def related(relation: str, candidates: list, anchors: list, count: int, image_size: int) -> set[int]:
    found = set()
    for anchor in anchors:
        others = [one for one in candidates if one is not anchor]
        distances = [(math.dist(centre(one), centre(anchor)), one["id"]) for one in others]
        if relation in ("closest", "farthest"):
            found |= {index for _, index in sorted(distances, reverse=relation == "farthest")[:count]}
        elif relation == "near":
            found |= {index for distance, index in distances if distance < 0.36 * image_size}
        else:
            side = {"above": "top", "below": "bottom"}.get(relation, relation)
            found |= {one["id"] for one in others if from_side(one, side) < from_side(anchor, side)}
    return found


def placed(words: str, annotations: list, count: int, image_size: int) -> set[int]:
    for side, pattern in EXTREMES:
        if re.search(rf"\b(?:{pattern})\b", words):
            return leading(matching(re.sub(rf"\b(?:{pattern})\b", "", words), annotations), side, count)
    patterns = [(" ".join(match.groups()), CORNER) for match in [CORNER.search(words)] if match]
    patterns += [(side, re.compile(rf"\b(?:{pattern})\b")) for side, pattern in HALVES]
    place, pattern = next(((place, p) for place, p in patterns if p.search(words)), (None, None))
    if place is None:
        return {one["id"] for one in matching(words, annotations)}
    candidates = matching(pattern.sub("", words), annotations)
    if pattern.search(words).start() == 0:
        return {one["id"] for one in candidates}  # "the left star" may be the leftmost, wherever it is
    sides = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "upper": (1, -1), "bottom": (1, 1), "lower": (1, 1)}
    found = set()
    for one in candidates:
        offset = [value / image_size - 0.5 for value in centre(one)]
        if place == "middle":
            inside = max(map(abs, offset)) < 0.16
        else:
            inside = all(offset[sides[side][0]] * sides[side][1] > 0 for side in place.split())
        found |= {one["id"]} if inside else set()
    return found
