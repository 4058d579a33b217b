"""Sentences of embedded scenes that name nothing, and those that name several objects."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from magnet_fast.cli import app
from magnet_fast.data import Refer
from magnet_fast.data.check import check_data
from magnet_fast.data.scenes import describe_scene, write_scenes, writing
from magnet_fast.data.scenes.drawing import Scene, SceneObject
from magnet_fast.data.scenes.expressions import (
    MARGIN,
    Description,
    Expression,
    describes,
    is_unambiguous,
    names_nothing,
)

from .reading import MEANING, RELATIONS, WORDS, all_named

pytestmark = pytest.mark.slow

VOCABULARY = Path(writing.__file__).parents[1] / "vocab.txt"
ABSENT = {f"absent/{what}" for what in ("shape", "colour", "size", "texture", "place")}
KINDS = {
    "easy": ABSENT | {"several/attribute", "several/place", "several/pair"},
    "hard": ABSENT
    | {f"absent/{what}" for what in ("rank", "relation", "anchor")}
    | {f"several/{kind}" for kind in ("attribute", "place", "relation", "pair")},
}


class Written:
    """The files as they are: refs, and per image its annotations."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
        self.images: dict[int, list[dict]] = {}
        for annotation in json.loads((root / "refcoco" / "instances.json").read_text())["annotations"]:
            self.images.setdefault(annotation["image_id"], []).append(annotation)

    def sentences(self):
        for ref in self.refs:
            for sentence in ref["sentences"]:
                yield ref, sentence

    def pictures(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.root.rglob("*.jpg")}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("beyond")
    return {level: write_scenes(folder / level, 80, 12, level, negatives=4, several=3) for level in KINDS}


@pytest.fixture(params=["easy", "hard"])
def level(request) -> str:
    return request.param


@pytest.fixture
def written(level, roots) -> Written:
    return Written(roots[level])


def test_a_plain_reader_finds_nothing_for_absent_sentences(written):
    count = 0
    for ref, sentence in written.sentences():
        named = all_named(sentence["raw"], written.images[ref["image_id"]], 128)
        if sentence["kind"].startswith("absent/"):
            assert named == set(), sentence["raw"]
            count += 1
        else:
            assert named, sentence["raw"]
    assert count > 500


def test_a_plain_reader_finds_the_very_set(written):
    count = 0
    for ref, sentence in written.sentences():
        if sentence["kind"].startswith("several/"):
            named = all_named(sentence["raw"], written.images[ref["image_id"]], 128)
            assert sorted(named) == ref["ann_id"], sentence["raw"]
            count += 1
    assert count > 100


def test_written_as_the_field_does(written, level):
    kinds: Counter[str] = Counter()
    for ref in written.refs:
        annotations = {one["id"]: one for one in written.images[ref["image_id"]]}
        true = [sentence for sentence in ref["sentences"] if "exist" not in sentence]
        absent = [sentence for sentence in ref["sentences"] if "exist" in sentence]
        assert true and ref["sentences"] == [*true, *absent] and len(absent) <= 4  # the true ones first
        assert all(sentence["exist"] is False for sentence in absent)
        assert all(sentence["kind"].startswith("absent/") == ("exist" in sentence) for sentence in ref["sentences"])
        assert len({sentence["raw"] for sentence in ref["sentences"]}) == len(ref["sentences"])
        several = isinstance(ref["ann_id"], list)
        assert several == isinstance(ref["category_id"], list)
        assert all(sentence["kind"].startswith("several/") == several for sentence in true)
        if several:
            assert 2 <= len(set(ref["ann_id"])) == len(ref["ann_id"]) < len(annotations)
            assert ref["category_id"] == [annotations[one]["category_id"] for one in ref["ann_id"]]
        kinds.update(sentence["kind"] for sentence in ref["sentences"])
    assert {kind for kind in kinds if "/" in kind} == KINDS[level]
    ids = [sentence["sent_id"] for _, sentence in written.sentences()]
    assert ids == list(range(1, len(ids) + 1))
    per_image = Counter(ref["image_id"] for ref, one in written.sentences() if one["kind"].startswith("several/"))
    assert max(per_image.values()) <= 3


def test_splits_keep_their_kinds(written, level):
    last = "relation" if level == "hard" else "place"
    of_split: dict[str, set[str]] = {}
    for ref, sentence in written.sentences():
        if "exist" not in sentence:
            of_split.setdefault(ref["split"], set()).add(sentence["kind"])
    assert of_split["testA"] == {"attribute", "several/attribute"}
    assert of_split["testB"] == {last, f"several/{last}"}


def changed_words(true: str, absent: str) -> tuple[int, list[str], list[str]]:
    """Where two sentences begin to differ, and the words that the one has there and the other."""
    old, new = true.split(), absent.split()
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    return start, old[start : len(old) - end], new[start : len(new) - end]


def is_the_change(true: str, absent: str, what: str) -> bool:
    """Whether the two differ in one place, by words of the kind that `what` says."""
    start, old, new = changed_words(true, absent)
    if what in ("place", "rank", "relation"):
        ranks = {"second", "third", "fourth"}
        return not any(word in MEANING for word in old + new) and ({*old, *new} <= ranks) == (what == "rank")
    if len(old) != 1 or len(new) != 1:
        return False
    (before, after) = (properties_of(word) for word in (*old, *new))
    if before is None or after is None or before[0] != after[0] or before[1] == after[1]:
        return False
    relation = next((match for _, p in RELATIONS if (match := re.search(rf" (?:{p}) ", true))), None)
    in_anchor = relation is not None and start >= len(true[: relation.end()].split())
    return what == ("anchor" if in_anchor else before[0])


def properties_of(word: str) -> tuple[str, str] | None:
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in MEANING:
            return MEANING[form]
    return None


def test_absent_sentences_change_one_thing(written):
    for ref, sentence in written.sentences():
        if "exist" in sentence:
            true = [one["raw"] for one in ref["sentences"] if "exist" not in one]
            what = sentence["kind"].removeprefix("absent/")
            assert any(is_the_change(one, sentence["raw"], what) for one in true), (true, sentence)


@pytest.mark.parametrize("name", ["colour", "shape"])
def test_words_alone_do_not_tell(roots, name):
    """Every colour and shape occurs in true and in absent sentences, often one that the picture shows elsewhere."""
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for _, sentence in Written(roots["hard"]).sentences():
        found = map(properties_of, sentence["tokens"])
        seen["exist" in sentence] |= {one[1] for one in found if one and one[0] == name}
    assert seen[True] == seen[False] == set(WORDS[name])
    shown = []
    for number in range(100):
        drawn = describe_scene(14, number, "hard", "train", 64, negatives=1)
        values = {getattr(item, name) for item in drawn.scene.objects}
        absent = [one for referent in drawn.referents for one in referent.absent if one.changed == name]
        shown += [getattr(one.target, name) in values for one in absent]
    assert sum(shown) > 0.25 * len(shown) > 10


def test_every_word_is_in_the_vocabulary(written):
    words = {word for _, sentence in written.sentences() for word in sentence["tokens"]}
    assert words <= set(VOCABULARY.read_text().splitlines())
    assert max(len(sentence["tokens"]) for _, sentence in written.sentences()) <= 12


def test_pictures_and_true_sentences_stay_as_they_are(written, level, tmp_path):
    plain = Written(write_scenes(tmp_path / "plain", 80, 12, level))
    assert plain.pictures() == written.pictures()
    assert plain.images == written.images

    def true(data: Written) -> list:
        return [
            (ref["image_id"], ref["ann_id"], ref["split"], sentence["raw"], sentence["kind"])
            for ref, sentence in data.sentences()
            if isinstance(ref["ann_id"], int) and "exist" not in sentence
        ]

    assert true(plain) == true(written)


def test_same_for_all_numbers_of_workers_and_any_order(tmp_path, level, monkeypatch):
    options = {"negatives": 2, "several": 2}
    one = write_scenes(tmp_path / "one", 12, 8, level, 64, **options)
    monkeypatch.setattr(writing, "_CHUNK", 4)
    two = write_scenes(tmp_path / "two", 12, 8, level, 64, workers=2, **options)
    for name in ("refcoco/refs(unc).p", "refcoco/instances.json", "scenes.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    numbers = list(range(20))
    in_order = [describe_scene(8, number, level, "train", 64, **options).referents for number in numbers]
    random.Random(0).shuffle(numbers)
    for number in numbers:
        assert describe_scene(8, number, level, "train", 64, **options).referents == in_order[number]


def test_other_options_are_other_scenes(tmp_path):
    write_scenes(tmp_path / "a", 4, 0, image_size=64, negatives=1)
    assert json.loads((tmp_path / "a" / "scenes.json").read_text())["negatives"] == 1
    with pytest.raises(FileExistsError, match="holds other scenes"):
        write_scenes(tmp_path / "a", 4, 0, image_size=64)
    write_scenes(tmp_path / "a", 4, 0, image_size=64, negatives=1)


def test_our_reader_takes_several_targets(roots):
    refer = Refer(roots["hard"])
    several = [ref for split in refer.splits for ref in refer.refs(split) if len(ref.ann_ids) > 1]
    areas = {one["id"]: one["area"] for ones in Written(roots["hard"]).images.values() for one in ones}
    assert len(several) > 100
    for ref in several[::10]:
        assert int(np.sum(refer.mask(ref))) == sum(areas[one] for one in ref.ann_ids)


def test_the_evaluator_agrees(level):
    for number in range(60):
        drawn = describe_scene(13, number, level, "train", 64, negatives=10, several=3)
        for referent in drawn.referents:
            for expression in referent.expressions:
                assert is_unambiguous(drawn.scene, expression)
                assert describes(drawn.scene, expression, slack=MARGIN) == {*referent.indices}
                assert describes(drawn.scene, expression, slack=-MARGIN) == {*referent.indices}
            for expression in referent.absent:
                assert names_nothing(drawn.scene, expression) and expression.label.startswith("absent/")
            assert any(one.several for one in referent.expressions) == (len(referent.indices) > 1)


@pytest.mark.parametrize(("named", "like"), [("box", "square"), ("circle", "ring")])
def test_what_looks_alike_is_not_absent(named, like):
    """A square is a rectangle as well: no rectangle is absent where a square would fit."""
    count = 0
    for number in range(150):
        drawn = describe_scene(15, number, "hard", "train", 64, negatives=10)
        for absent in (one for referent in drawn.referents for one in referent.absent if one.target.shape == named):
            assert names_nothing(drawn.scene, replace(absent, target=replace(absent.target, shape=like)))
            count += 1
    assert count > 50


def test_command_line(tmp_path):
    arguments = ["data", "scenes", "--images", "6", "--level", "hard", "--image-size", "64"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a"), "--negatives", "2", "--several", "1"])
    assert result.exit_code == 0, result.output
    again = write_scenes(tmp_path / "b", 6, 0, "hard", 64, negatives=2, several=1)
    assert (tmp_path / "a/refcoco/refs(unc).p").read_bytes() == (again / "refcoco/refs(unc).p").read_bytes()
    assert any(isinstance(ref["ann_id"], list) for ref in Written(again).refs)
    assert check_data(again).problems == []


def make_scene(*objects: tuple[str, float, float]) -> Scene:
    """Objects from "red star" and a place."""
    items = [SceneObject(words.split()[1], words.split()[0], "small", "plain", x, y, 0.2) for words, x, y in objects]
    return Scene(tuple(items), "hard", 0)


SCENE = make_scene(("red star", 0.1, 0.2), ("red star", 0.3, 0.25), ("blue star", 0.6, 0.5), ("red box", 0.95, 0.7))
STAR, RED, BOX = Description(shape="star"), Description(colour="red"), Description(shape="box")


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        (Expression("attribute", STAR, several=True), {0, 1, 2}),
        (Expression("attribute", STAR, several=True, count=3), {0, 1, 2}),
        (Expression("attribute", STAR, several=True, count=2), None),  # there are three
        (Expression("attribute", BOX, several=True), None),  # there is one
        (Expression("place", STAR, place="left", several=True), {0, 1}),
        (Expression("place", STAR, place="leftmost", several=True, count=2), {0, 1}),
        (Expression("place", STAR, place="topmost", several=True, count=2), {0, 1}),
        (Expression("place", RED, place="bottommost", several=True, count=2), None),  # the upper two are as high
        (Expression("place", STAR, place="leftmost", several=True, count=4), None),
        (
            Expression("relation", STAR, relation="above", anchor=BOX, several=True),
            None,
        ),  # they lie far aside
        (Expression("relation", STAR, relation="left of", anchor=BOX, several=True), {0, 1, 2}),
        (Expression("relation", STAR, relation="farthest from", anchor=BOX, several=True, count=2), {0, 1}),
        (Expression("relation", STAR, relation="closest to", anchor=BOX, several=True, count=2), {1, 2}),
        (Expression("relation", BOX, relation="above", anchor=STAR, several=True), None),
        (Expression("pair", Description(colour="blue"), second=BOX, several=True), {2, 3}),
        (Expression("pair", STAR, second=BOX, several=True), None),  # three stars
        (Expression("pair", BOX, second=BOX, several=True), None),
    ],
)
def test_meaning_of_several(expression, named):
    assert is_unambiguous(SCENE, expression) == (named is not None)
    if named is not None:
        assert describes(SCENE, expression) == named


@pytest.mark.parametrize(
    ("expression", "nothing"),
    [
        (Expression("attribute", Description(shape="star", colour="green")), True),
        (Expression("attribute", Description(shape="star", colour="blue")), False),
        (Expression("place", STAR, place="bottom"), False),  # the blue star is as good as in the middle
        (Expression("place", STAR, place="bottom right"), False),
        (Expression("place", BOX, place="left"), True),
        (Expression("place", STAR, place="rightmost"), False),
        (Expression("order", STAR, rank=4, side="left"), True),
        (Expression("order", STAR, rank=3, side="left"), False),
        (Expression("relation", STAR, relation="below", anchor=BOX), True),
        (Expression("relation", BOX, relation="below", anchor=Description(colour="green")), True),  # no anchor
        (Expression("relation", BOX, relation="above", anchor=STAR), False),  # of three stars, which?
        (Expression("relation", STAR, relation="closest to", anchor=BOX), False),
    ],
)
def test_meaning_of_nothing(expression, nothing):
    assert names_nothing(SCENE, expression) == nothing


def test_anything_higher_may_be_above():
    """Far aside and a little higher: too unsure for a sentence that names it, too near for one that names nothing."""
    scene = make_scene(("red star", 0.1, 0.4), ("blue box", 0.9, 0.5))
    above = Expression("relation", STAR, relation="above", anchor=BOX)
    assert describes(scene, above, slack=MARGIN) == set()
    assert not names_nothing(scene, above)
