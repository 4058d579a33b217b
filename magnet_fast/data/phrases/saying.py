"""What can be said of the regions of a photograph: sentences that are true of exactly the regions they name."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from magnet_fast.data.phrases.colours import colour_shares
from magnet_fast.data.phrases.names import GROUPS, plural, words_for
from magnet_fast.data.phrases.photograph import Photograph

KINDS = ("unique", "stuff", "all", "place", "order", "size", "colour", "relation", "general", "absent")

# All measures are shares of the picture's sides, all choices ours.
APART = 0.12  # between the middles of two objects that are told apart by their place
NEXT = 0.05  # between neighbours in a row
FACTOR = 1.5  # between the areas of the largest and the next
DOMINANT, FOREIGN = 0.5, 0.15  # shares of a colour in what is called by it, and at most in the others
_COUNTED = 8  # the most objects that are put in order
_SEEN = 0.01  # share of all of a class together, and of stuff


class Phrase(NamedTuple):
    """A sentence and what it names.

    Attributes:
        text: the sentence.
        kind: one of `KINDS`.
        regions: those whose union it names; none where it names nothing in the photograph.
    """

    text: str
    kind: str
    regions: tuple[int, ...]


_ENDS = {
    ("place", "left"): ("the {} on the left", "left {}", "the left {}", "the {} to the left"),
    ("place", "right"): ("the {} on the right", "right {}", "the right {}", "the {} to the right"),
    ("place", "top"): ("the upper {}", "the top {}", "the {} at the top"),
    ("place", "bottom"): ("the lower {}", "the bottom {}", "the {} at the bottom"),
    ("order", "left"): ("the leftmost {}", "the {} on the far left", "the first {} from the left", "far left {}"),
    ("order", "right"): ("the rightmost {}", "the {} on the far right", "the first {} from the right", "far right {}"),
    ("order", "top"): ("the topmost {}", "the highest {}"),
    ("order", "bottom"): ("the lowest {}", "the bottommost {}"),
}
_SECOND = {
    "left": ("the second {} from the left",),
    "right": ("the second {} from the right",),
}
_MIDDLE = ("the {} in the middle", "the middle {}", "the center {}")
_SIZES = {
    "big": ("the biggest {}", "the largest {}", "biggest {}"),
    "small": ("the smallest {}", "smallest {}"),
}
_OF_TWO = {"big": ("the bigger {}", "the larger {}"), "small": ("the smaller {}",)}
_ALONE = ("the {}", "the {}", "{}", "a {}")
_ALL = ("all the {}", "all {}", "the {}", "every {one}")
_BESIDE = {
    "left": "the {} to the left of the {}",
    "right": "the {} to the right of the {}",
    "above": "the {} above the {}",
    "below": "the {} below the {}",
}


def phrases(photo: Photograph, absent: Sequence[str], draw: random.Random) -> list[Phrase]:
    """Everything that this module can say of a photograph, each thing once, in words drawn at random.

    Args:
        photo: its regions; a class is taken to have no other objects in it than those.
        absent: classes that may be asked for though they are not there; those that are there are left out.
        draw: of the words.
    """
    found: list[Phrase] = []
    for name, members in photo.members.items():
        if not photo.things[members[0]]:
            found += _stuff(photo, name, members, draw)
            continue
        words = [draw.choice(words_for(name)) for _ in range(8)]
        found += _of_class(photo, members, words, draw)
        found += _colours(photo, members, draw.choice(words_for(name)), draw)
        found += _relations(photo, name, members, draw)
    for word, classes in GROUPS.items():
        members = [region for name in classes for region in photo.members.get(name, ())]
        if len(members) == 1 and photo.clear[members[0]]:
            found.append(Phrase(draw.choice(_ALONE[:3]).format(word), "general", tuple(members)))
        elif len(members) > 1 and photo.areas[members].sum() >= _SEEN:
            found.append(Phrase(_all_of(word, draw), "general", tuple(members)))
    said = {word for name in photo.members for word in words_for(name)}
    missing = [name for name in absent if said.isdisjoint(words_for(name))]
    if missing:
        word = draw.choice(words_for(draw.choice(missing)))
        found.append(Phrase(draw.choice(_ALONE[:3]).format(word), "absent", ()))
    return found


def _stuff(photo: Photograph, name: str, members: list[int], draw: random.Random) -> Iterator[Phrase]:
    shared = [other for other in photo.members if other != name and not photo.things[photo.members[other][0]]]
    taken = {word for other in shared for word in words_for(other)}
    words = [word for word in words_for(name) if word not in taken]
    if words and photo.areas[members].sum() >= _SEEN:
        yield Phrase(draw.choice(("the {}", "the {}", "{}")).format(draw.choice(words)), "stuff", tuple(members))


def _of_class(photo: Photograph, members: list[int], words: list[str], draw: random.Random) -> Iterator[Phrase]:
    """One class: the only one, all, and by place, order and size."""
    count = len(members)
    if count == 1:
        if photo.clear[members[0]]:
            yield Phrase(draw.choice(_ALONE).format(words[0]), "unique", (members[0],))
        return
    if photo.areas[members].sum() >= _SEEN:
        yield Phrase(_all_of(words[1], draw), "all", tuple(members))
    if photo.crowds[members].any() or photo.vague[members].any() or count > _COUNTED:
        return
    kind = "place" if count == 2 else "order"
    for axis, sides in ((0, ("left", "right")), (1, ("top", "bottom"))):
        row = sorted(members, key=lambda region: photo.centres[region, axis])
        at = photo.centres[row, axis]
        for side, step in zip(sides, (1, -1), strict=True):
            ends = row[::step]
            gaps = abs(at[::step][1:] - at[::step][:-1])
            if gaps[0] >= (APART if kind == "place" else NEXT) and photo.clear[ends[0]]:
                yield Phrase(draw.choice(_ENDS[kind, side]).format(words[2]), kind, (ends[0],))
            if count > 2 and side in _SECOND and min(gaps[:2]) >= NEXT and photo.clear[ends[1]]:
                yield Phrase(draw.choice(_SECOND[side]).format(words[3]), "order", (ends[1],))
        if count == 3 and axis == 0 and min(abs(at[1:] - at[:-1])) >= NEXT and photo.clear[row[1]]:
            yield Phrase(draw.choice(_MIDDLE).format(words[4]), "order", (row[1],))
    by_area = sorted(members, key=lambda region: -photo.areas[region])
    for size, (first, second) in (("big", by_area[:2]), ("small", by_area[:-3:-1])):
        large, little = sorted(photo.areas[[first, second]], reverse=True)
        if large >= FACTOR * little and photo.clear[first]:
            ways = _SIZES[size] + (_OF_TWO[size] if count == 2 else ())
            yield Phrase(draw.choice(ways).format(words[5]), "size", (first,))


def _all_of(word: str, draw: random.Random) -> str:
    return draw.choice(_ALL).format(plural(word), one=word)


def _colours(photo: Photograph, members: list[int], word: str, draw: random.Random) -> Iterator[Phrase]:
    """One of a class by a colour that the others do not have; and a colour that the only one does not have."""
    if photo.crowds[members].any() or photo.vague[members].any() or len(members) > _COUNTED:
        return
    if not photo.clear[members].any() or not photo.masks[members].any(axis=(1, 2)).all():
        return
    shares = [colour_shares(photo.pixels[photo.masks[region]]) for region in members]
    for place, region in enumerate(members):
        colour, share = max(shares[place].items(), key=lambda entry: entry[1])
        others = [other[colour] for i, other in enumerate(shares) if i != place]
        if share >= DOMINANT and all(other <= FOREIGN for other in others) and photo.clear[region]:
            yield Phrase(draw.choice(("the {} {}", "{} {}")).format(colour, word), "colour", (region,))
    never = [colour for colour in shares[0] if all(one[colour] < 0.01 for one in shares)]
    if never:
        yield Phrase(f"the {draw.choice(never)} {word}", "absent", ())


def _relations(photo: Photograph, name: str, members: list[int], draw: random.Random) -> Iterator[Phrase]:
    """One of a class by its place beside the only object of another class."""
    if photo.crowds[members].any() or photo.vague[members].any() or len(members) > _COUNTED:
        return
    for other, (landmark, *more) in photo.members.items():
        if other == name or more or not photo.clear[landmark] or not photo.things[landmark]:
            continue
        away = photo.centres[members] - photo.centres[landmark]
        for side, axis, sign in (("left", 0, -1), ("right", 0, 1), ("above", 1, -1), ("below", 1, 1)):
            on_side = [i for i in range(len(members)) if sign * away[i, axis] >= APART and _beside(away[i], axis)]
            doubtful = [i for i in range(len(members)) if i not in on_side and sign * away[i, axis] > -NEXT]
            if len(on_side) == 1 and not doubtful and photo.clear[members[on_side[0]]]:
                words = draw.choice(words_for(name)), draw.choice(words_for(other))
                yield Phrase(_BESIDE[side].format(*words), "relation", (members[on_side[0]],))


def _beside(away: Sequence[float], axis: int) -> bool:
    """Whether an object lies mainly in this direction."""
    return abs(away[axis]) >= abs(away[1 - axis])
