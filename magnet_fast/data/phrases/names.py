"""What people call the classes of a data set: other words for a class, plurals, and words for several classes."""

from __future__ import annotations

import re

OTHERS: dict[str, tuple[str, ...]] = {
    "person": ("person", "human"),
    "bicycle": ("bicycle", "bike"),
    "car": ("car", "automobile"),
    "motorcycle": ("motorcycle", "motorbike"),
    "airplane": ("airplane", "plane", "aircraft"),
    "truck": ("truck", "lorry"),
    "boat": ("boat", "ship"),
    "traffic light": ("traffic light", "stoplight"),
    "fire hydrant": ("fire hydrant", "hydrant"),
    "dog": ("dog", "puppy"),
    "cat": ("cat", "kitty"),
    "cow": ("cow", "cattle"),
    "backpack": ("backpack", "rucksack"),
    "handbag": ("handbag", "purse", "bag"),
    "tie": ("tie", "necktie"),
    "suitcase": ("suitcase", "luggage"),
    "skis": ("skis", "pair of skis"),
    "sports ball": ("sports ball", "ball"),
    "baseball glove": ("baseball glove", "mitt"),
    "tennis racket": ("tennis racket", "racket"),
    "wine glass": ("wine glass", "glass"),
    "cup": ("cup", "mug"),
    "donut": ("donut", "doughnut"),
    "couch": ("couch", "sofa"),
    "potted plant": ("potted plant", "plant"),
    "dining table": ("dining table", "table"),
    "tv": ("tv", "television", "monitor"),
    "laptop": ("laptop", "computer"),
    "remote": ("remote", "remote control"),
    "cell phone": ("cell phone", "phone", "mobile phone"),
    "oven": ("oven", "stove"),
    "refrigerator": ("refrigerator", "fridge"),
    "teddy bear": ("teddy bear", "stuffed animal"),
    "hair drier": ("hair drier", "hair dryer"),
    "tree": ("trees", "tree"),
    "building-other": ("building",),
    "wall-other": ("wall",),
    "sky-other": ("sky",),
    "floor-other": ("floor",),
    "floor-wood": ("wooden floor", "floor"),
    "food-other": ("food",),
    "water-other": ("water",),
    "window-other": ("window",),
    "wall-brick": ("brick wall", "wall"),
    "wall-stone": ("stone wall", "wall"),
    "wall-tile": ("tiled wall", "wall"),
    "wall-wood": ("wooden wall", "wall"),
    "dirt": ("dirt ground", "dirt", "ground"),
    "grass": ("grass", "lawn"),
    "pavement": ("pavement", "sidewalk"),
    "mountain": ("mountains", "mountain"),
    "rock": ("rocks", "rock"),
    "sea": ("sea", "ocean", "water"),
    "road": ("road", "street"),
    "playingfield": ("playing field", "field"),
    "rug": ("rug", "carpet"),
    "window-blind": ("window blind", "blinds"),
    "fence": ("fence",),
}
"""Words for COCO's classes, the usual one first; other classes are called as the data call them."""

GROUPS: dict[str, tuple[str, ...]] = {
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "vehicle": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
}
"""Words for one object of any of several classes."""

_IRREGULAR = {
    "person": "people", "human": "humans", "knife": "knives", "sheep": "sheep", "mouse": "mice",
    "cattle": "cattle", "scissors": "scissors", "skis": "skis", "pair of skis": "skis", "luggage": "luggage",
    "broccoli": "broccoli", "child": "children", "man": "men", "woman": "women", "shelf": "shelves",
}  # fmt: skip
_SUFFIX = re.compile(r"-(merged|stuff)$")


def words_for(name: str) -> tuple[str, ...]:
    """Words for one object of a class, or for stuff, the usual one first."""
    plain = _SUFFIX.sub("", name)
    return OTHERS.get(plain, (plain.replace("-", " ").replace("_", " "),))


def plural(word: str) -> str:
    """Of a noun in the singular."""
    *before, last = word.split(" ")
    if word in _IRREGULAR or last in _IRREGULAR:
        return _IRREGULAR.get(word) or " ".join([*before, _IRREGULAR[last]])
    if last.endswith(("s", "x", "ch", "sh", "z")):
        return f"{word}es"
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"
