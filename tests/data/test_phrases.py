"""Sentences made of regions: each is true of its mask, told again from the text and the pixels alone."""

from __future__ import annotations

import colorsys
import json
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast.data.datasets import open_reader
from magnet_fast.data.phrases import Photograph, Phrase, PhraseDataset, phrases
from magnet_fast.data.phrases.changing import Cutout, changed, cropped, cut_out, mirrored, pasted, relit
from magnet_fast.data.phrases.colours import NAMES, colour_shares
from magnet_fast.data.phrases.names import GROUPS, OTHERS, plural, words_for
from magnet_fast.data.phrases.saying import KINDS
from magnet_fast.data.tokenizers import Tokenizer
from magnet_fast.models import InputSpec
from tests.data.photographs import COLOURS, STUFF, THINGS, photograph, write_photographs


def middle(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return (columns.min() + columns.max() + 1) / 2 / mask.shape[1], (rows.min() + rows.max() + 1) / 2 / mask.shape[0]


def share_of(photo: Photograph, region: int, colour: str) -> float:
    """By the standard library's hue, as coarse as the colours of these photographs allow."""
    hues = {
        "red": lambda h, s, v: s > 0.5 and (h < 0.05 or h > 0.95),
        "green": lambda h, s, v: s > 0.5 and 0.2 < h < 0.45,
        "blue": lambda h, s, v: s > 0.5 and 0.5 < h < 0.72,
        "white": lambda h, s, v: s < 0.1 and v > 0.9,
    }
    if colour not in hues:
        return 0.0
    seen = photo.pixels[photo.masks[region]] / 255
    return float(np.mean([hues[colour](*colorsys.rgb_to_hsv(*pixel)) for pixel in seen]))


def classes_called(word: str, photo: Photograph) -> set[str]:
    every = {*THINGS, *STUFF, *photo.names, *OTHERS, *GROUPS["animal"], *GROUPS["vehicle"]}
    if word in GROUPS:
        return set(GROUPS[word])
    return {name for name in every if word in words_for(name)}


@cache
def vocabulary() -> tuple[list[str], dict[str, str], str]:
    """Nouns, those in the plural, and a pattern of all."""
    words = sorted({word for name in {*THINGS, *STUFF, *OTHERS} for word in words_for(name)} | set(GROUPS), key=len)
    plurals = {plural(word): word for word in words}
    return words, plurals, "|".join(map(re.escape, sorted([*words, *plurals], key=len, reverse=True)))


def named(text: str, photo: Photograph) -> list[int]:
    """The regions that a sentence names, read from its words: by another road than the one that made it."""
    everything = range(len(photo.names))
    centre = [middle(mask) for mask in photo.masks]

    def of(word: str) -> list[int]:
        return [i for i in everything if photo.names[i] in classes_called(word, photo)]

    words, plurals, nouns = vocabulary()
    beside = re.fullmatch(rf"the ({nouns}) (to the left of|to the right of|above|below) the ({nouns})", text)
    if beside:
        one, how, other = beside.groups()
        (landmark,) = of(other)
        axis, sign = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}[how]
        return [i for i in of(one) if sign * (centre[i][axis] - centre[landmark][axis]) > 0]
    found = re.search(rf"(?<![a-z])({nouns})(?![a-z])", text)
    assert found, text
    noun, rest = found.group(), (text[: found.start()] + "_" + text[found.end() :])
    rest = re.sub(r"^(the|a) ", "", rest)
    members = of(plurals.get(noun, noun) if noun not in words else noun)
    several = rest in ("all the _", "all _", "every _") or (noun in plurals and rest == "_")
    if several or rest in ("_", "only _"):
        assert several or len(members) < 2 or not photo.things[members[0]] or noun in plurals, text
        return members
    if rest.split(" ")[0] in NAMES:
        return [i for i in members if share_of(photo, i, rest.split(" ")[0]) > 0.3]
    second = re.fullmatch(r"(first|second) _ from the (left|right)", rest)
    rows = {"x": sorted(members, key=lambda i: centre[i][0]), "y": sorted(members, key=lambda i: centre[i][1])}
    if second:
        row = rows["x"] if second[2] == "left" else rows["x"][::-1]
        return [row[("first", "second").index(second[1])]]
    if rest in ("_ in the middle", "middle _", "center _"):
        assert len(members) == 3
        return [rows["x"][1]]
    for pattern, row, place in (
        (r"left _|leftmost _|far left _|_ (on|to) the (far )?left", "x", 0),
        (r"right _|rightmost _|far right _|_ (on|to) the (far )?right", "x", -1),
        (r"(upper|top|topmost|highest) _|_ at the top", "y", 0),
        (r"(lower|bottom|lowest|bottommost) _|_ at the bottom", "y", -1),
    ):
        if re.fullmatch(pattern, rest):
            return [rows[row][place]]
    area = sorted(members, key=lambda i: photo.masks[i].sum())
    if re.fullmatch(r"(biggest|largest|bigger|larger) _", rest):
        return [area[-1]]
    assert re.fullmatch(r"(smallest|smaller) _", rest), text
    return [area[0]]


def check(photo: Photograph, phrase: Phrase) -> None:
    assert phrase.kind in KINDS
    assert sorted(named(phrase.text, photo)) == sorted(phrase.regions), phrase
    if phrase.kind in ("unique", "place", "order", "size", "colour", "relation"):
        (region,) = phrase.regions
        assert photo.masks[region].mean() >= 0.004 and not photo.crowds[region] and not photo.vague[region]


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_sentence_is_true(seed: int) -> None:
    photo = photograph(seed)
    for phrase in phrases(photo, THINGS, random.Random(seed)):
        check(photo, phrase)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_every_sentence_is_true_of_a_changed_photograph(seed: int) -> None:
    donor = photograph(seed + 1)

    def find(name: str | None, draw: random.Random) -> Cutout | None:
        fit = [i for i, own in enumerate(donor.names) if name in (None, own)]
        return cut_out(donor, draw.choice(fit)) if fit else None

    photo = changed(photograph(seed), 40, 2.0, find, random.Random(seed))
    assert photo.pixels.shape == (40, 40, 3) and photo.masks.shape == (len(photo.names), 40, 40)
    for phrase in phrases(photo, THINGS, random.Random(seed)):
        if phrase.kind != "colour" and not set(phrase.text.split(" ")) & set(NAMES):  # other light, other colours
            check(photo, phrase)


def test_all_kinds_are_said() -> None:
    said = {phrase.kind for seed in range(80) for phrase in phrases(photograph(seed), THINGS, random.Random(seed))}
    assert said == set(KINDS)


def test_crowds_and_vague_regions_are_never_named_alone() -> None:
    photo = photograph(0)
    one = np.zeros((2, 36, 36), bool)
    one[0, 3:15, 3:15] = one[1, 19:31, 19:31] = True
    for flag in ("crowds", "vague"):
        flags = {"crowds": np.zeros(2, bool), "vague": np.zeros(2, bool)}
        flags[flag][0] = True
        photo = Photograph(photo.pixels, one, ("dog", "dog"), np.ones(2, bool), **flags)
        kinds = {phrase.kind for phrase in phrases(photo, (), random.Random(0))}
        assert kinds == {"all", "general"}


def test_a_mirror_exchanges_left_and_right() -> None:
    masks = np.zeros((2, 40, 40), bool)
    masks[0, 10:20, 2:12], masks[1, 10:20, 28:38] = True, True
    flags = np.ones(2, bool), np.zeros(2, bool), np.zeros(2, bool)
    photo = Photograph(np.zeros((40, 40, 3), np.uint8), masks, ("cat", "cat"), *flags)

    def side(photo: Photograph) -> dict[str, tuple[int, ...]]:
        found = [phrase for phrase in phrases(photo, (), random.Random(1)) if phrase.kind == "place"]
        return {word: p.regions for p in found for word in ("left", "right") if word in p.text}

    assert side(photo) == {"left": (0,), "right": (1,)}
    assert side(mirrored(photo)) == {"left": (1,), "right": (0,)}


def test_what_a_crop_cuts_off_is_not_named_alone() -> None:
    masks = np.zeros((2, 40, 40), bool)
    masks[0, 5:15, 5:15], masks[1, 20:30, 12:32] = True, True
    flags = np.ones(2, bool), np.zeros(2, bool), np.zeros(2, bool)
    photo = Photograph(np.zeros((40, 40, 3), np.uint8), masks, ("cat", "dog"), *flags)
    part = cropped(photo, (0, 0, 18, 40), 40)
    assert part.names == ("cat", "dog") and part.vague.tolist() == [False, True]  # 6 of 20 columns are left
    assert cropped(photo, (0, 0, 40, 18), 36).names == ("cat",)
    assert cropped(photo, (0, 0, 40, 40), 40).masks.tolist() == masks.tolist()


def test_a_pasted_object_covers_what_lies_behind() -> None:
    photo = photograph(11)
    cutout = Cutout(np.full((6, 4, 3), 250, np.uint8), np.ones((6, 4), bool), "cup")
    with_it = pasted(photo, cutout, 0.5, (0.5, 0.5))
    new = with_it.masks[-1]
    assert with_it.names[-1] == "cup" and new.sum() == 18 * 12
    assert not (with_it.masks[:-1] & new).any()
    inner = new & ~np.roll(~new, 1, 0) & ~np.roll(~new, -1, 0) & ~np.roll(~new, 1, 1) & ~np.roll(~new, -1, 1)
    assert (with_it.pixels[inner] > 220).all()
    far = ~new & ~np.roll(new, 3, 0) & ~np.roll(new, -3, 0) & ~np.roll(new, 3, 1) & ~np.roll(new, -3, 1)
    assert (with_it.pixels[far] == photo.pixels[far]).all()


def test_light_changes_and_shapes_stay() -> None:
    photo = photograph(3)
    lit = relit(photo, random.Random(0))
    assert (lit.pixels != photo.pixels).any() and lit.masks is photo.masks


@pytest.mark.parametrize(
    ("colour", "rgb"),
    [
        *COLOURS.items(), ("black", (15, 15, 15)), ("gray", (128, 128, 128)), ("yellow", (230, 220, 30)),
        ("orange", (240, 130, 20)), ("brown", (110, 70, 30)), ("purple", (130, 40, 190)), ("pink", (240, 120, 180)),
    ],
)  # fmt: skip
def test_colours_are_called_by_their_names(colour: str, rgb: tuple[int, int, int]) -> None:
    shares = colour_shares(np.tile(np.array(rgb, np.uint8), (5000, 1)))
    assert set(shares) == set(NAMES) and shares[colour] == 1


def test_plurals() -> None:
    words = {"person": "people", "knife": "knives", "wine glass": "wine glasses", "bench": "benches", "bus": "buses"}
    words |= {"toothbrush": "toothbrushes", "computer mouse": "computer mice", "lorry": "lorries", "toy": "toys"}
    assert {word: plural(word) for word in words} == words


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photos"))


def dataset(root: Path, **changes) -> PhraseDataset:
    settings = {"size": 32, "per_image": 4, "cache": True, **changes}
    return PhraseDataset(open_reader(root, "own"), "train", Tokenizer(), InputSpec(size=64), **settings)


def test_samples_of_one_photograph_stand_together(root: Path) -> None:
    data = dataset(root)
    assert len(data) == 12 and data.regions.images == [0, 1, 2]  # the fourth is named by val, too
    samples = [data[i] for i in range(12)]
    for start in range(0, 12, 4):
        group = samples[start : start + 4]
        assert all(torch.equal(sample["image"], group[0]["image"]) for sample in group)
        assert len({data.record(start + i)["expression"] for i in range(4)}) > 1
    batch = data.collate(samples)
    assert batch["image"].shape == (12, 3, 32, 32) and batch["mask"].shape == (12, 32, 32)
    assert batch["extra"]["classes"].shape == (12, 4, 4) and batch["extra"]["boxes"].shape == (12, 4, 4, 4)
    for sample in samples:
        assert sample["exists"] == bool(sample["mask"].any())


def test_everything_is_drawn_from_seed_epoch_and_photograph(root: Path) -> None:
    first, again = dataset(root), dataset(root, cache=False)
    for data in (first, again):
        data.set_epoch(3)
    order = [7, 0, 11, 4]
    for index in order:
        a, b = first[index], again[index]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
        assert torch.equal(a["text"].ids, b["text"].ids)
    again.set_epoch(4)
    assert any(not torch.equal(first[index]["image"], again[index]["image"]) for index in order)


def test_maps_say_class_and_box_of_each_cell(root: Path) -> None:
    data = dataset(root)
    masks = np.zeros((2, 32, 32), bool)
    masks[0, :, :], masks[1, 8:24, 0:16] = True, True
    flags = np.array([False, True]), np.zeros(2, bool), np.zeros(2, bool)
    maps = data._maps(Photograph(np.zeros((32, 32, 3), np.uint8), masks, ("grass-merged", "cup"), *flags))
    cup, grass = 1 + data.names.index("cup"), 1 + data.names.index("grass-merged")
    assert maps["classes"].tolist() == [[grass] * 4, [cup] * 2 + [grass] * 2, [cup] * 2 + [grass] * 2, [grass] * 4]
    assert maps["boxes"][:, 1, 0].tolist() == [0.25, 0.5, 0.5, 0.5] and maps["boxes"][:, 0].abs().sum() == 0


def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size is 30; expected a multiple of 8"):
        dataset(root, size=30)
    with pytest.raises(IndexError, match="index is 12; there are 12 items"):
        dataset(root)[12]
    reader = open_reader(root, "own")
    content = json.loads(reader.instances_path.read_text())
    reader.instances_path = tmp_path / "instances.json"
    reader.instances_path.write_text(json.dumps({**content, "categories": []}))
    with pytest.raises(ValueError, match="names no categories"):
        PhraseDataset(reader, "train", Tokenizer(), InputSpec(), size=32)
    content["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": [1]}
    reader.instances_path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 1 cannot be decoded"):
        PhraseDataset(reader, "train", Tokenizer(), InputSpec(), size=32, cache=True)
    del reader.instances_path
    with pytest.raises(ValueError, match=r"has no instances\.json"):
        PhraseDataset(reader, "train", Tokenizer(), InputSpec(), size=32)
