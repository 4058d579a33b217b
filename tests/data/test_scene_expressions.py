"""Expressions name one object only, and every word of them is needed."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace

import pytest

from magnet_fast.data.scenes import describe_scene
from magnet_fast.data.scenes.drawing import Scene, SceneObject
from magnet_fast.data.scenes.expressions import MARGIN, Description, Expression, describes, is_unambiguous

from .reading import read

SPLITS = {"easy": ("train", "testA", "testB"), "hard": ("train", "testA", "testB")}


@pytest.fixture(scope="module", params=["easy", "hard"])
def described(request):
    """300 scenes of a level with their expressions."""
    level = request.param
    return [describe_scene(11, i, level, SPLITS[level][max(0, i % 6 - 3)], 64) for i in range(300)]


def every(described):
    for one in described:
        for referent in one.referents:
            for expression in referent.expressions:
                yield one.scene, referent.indices[0], expression


def make_scene(*objects: tuple[str, float, float]) -> Scene:
    """Objects from "small red plain star" and a place."""
    items = []
    for words, x, y in objects:
        size, colour, texture, shape = words.split()
        items.append(SceneObject(shape, colour, size, texture, x, y, 0.2))
    return Scene(tuple(items), "hard", 0)


def test_every_expression_names_its_object_alone(described):
    count = 0
    for scene, index, expression in every(described):
        assert describes(scene, expression, slack=MARGIN) == {index}
        assert describes(scene, expression, slack=-MARGIN) == {index}
        assert describes(scene, expression, slack=0.0) == {index}
        assert is_unambiguous(scene, expression)
        count += 1
    assert count > 1000


def test_distractors_make_the_words_needed(described):
    """Leave out any one named property or the place, order or relation: others could be meant (but for one extra)."""
    extras = 0
    for scene, index, expression in every(described):
        spare = 0
        for name in expression.target.named():
            shorter = replace(expression, target=replace(expression.target, **{name: None}))
            spare += describes(scene, shorter, slack=MARGIN) == {index}
        assert spare <= 1
        extras += spare
        alike = {i for i, item in enumerate(scene.objects) if expression.target.fits(item)}
        if expression.kind == "attribute":
            assert spare < len(expression.target.named())
            # Another object shares all named properties but one.
            assert any(
                sum(getattr(item, name) != getattr(expression.target, name) for name in expression.target.named()) == 1
                for item in scene.objects
            )
        elif expression.kind == "order":
            assert len(alike) >= 3
        else:
            assert len(alike) >= 2
        if expression.anchor is not None:
            for name in expression.anchor.named():
                shorter = replace(expression.anchor, **{name: None})
                assert sum(map(shorter.fits, scene.objects)) > 1
    assert extras < 0.2 * sum(1 for _ in every(described))


def test_no_object_is_favoured(described):
    """A model that sees only the picture and marks the largest object scores no better than chance, 1/n."""
    hits = chance = count = 0.0
    for one in described:
        largest = one.masks.sum(axis=(1, 2)).argmax()
        for referent in one.referents:
            hits += referent.indices == (largest,)
            chance += 1.0 / len(one.masks)
            count += 1
    assert abs(hits - chance) / count < 0.06


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_a_plain_reader_finds_every_referent(level, request):
    """From the files alone: each sentence, read by an unrelated small grammar, leads to the ref's annotation."""
    root = request.getfixturevalue(f"{level}_root")
    instances = json.loads((root / "refcoco" / "instances.json").read_text())
    refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    images: dict[int, list] = {}
    for annotation in instances["annotations"]:
        images.setdefault(annotation["image_id"], []).append(annotation)
    kinds: Counter[str] = Counter()
    for ref in refs:
        for sentence in ref["sentences"]:
            kinds[sentence["kind"]] += 1
            found = read(sentence["raw"], sentence["kind"], images[ref["image_id"]], 128)
            assert found == ref["ann_id"], sentence["raw"]
    assert set(kinds) == ({"attribute", "place"} if level == "easy" else {"attribute", "place", "order", "relation"})
    assert min(kinds.values()) >= 50


def test_wording(described):
    texts = [expression.text for _, _, expression in every(described)]
    assert all(1 <= len(text.split()) <= 12 and text == text.lower().strip() for text in texts)
    assert len(set(texts)) > 0.3 * len(texts)
    for one in described:
        for referent in one.referents:
            assert len({expression.text for expression in referent.expressions}) == len(referent.expressions)


STARS = make_scene(
    ("small red plain star", 0.2, 0.2),
    ("small red plain star", 0.5, 0.25),
    ("large red plain star", 0.85, 0.3),
    ("small blue plain box", 0.2, 0.8),
)
STAR = Description(shape="star")


@pytest.mark.parametrize(
    ("expression", "generous", "strict"),
    [
        (Expression("attribute", STAR), {0, 1, 2}, {0, 1, 2}),
        (Expression("attribute", Description(shape="star", size="large")), {2}, {2}),
        (Expression("attribute", Description(colour="green")), set(), set()),
        (Expression("place", STAR, place="left"), {0, 1}, {0}),  # the one in the middle is neither
        (Expression("place", STAR, place="right"), {1, 2}, {2}),
        (Expression("place", Description(), place="bottom left"), {3}, {3}),
        (Expression("place", STAR, place="leftmost"), {0}, {0}),
        (Expression("place", STAR, place="topmost"), {0, 1}, set()),  # too close to tell
        (Expression("place", Description(), place="bottommost"), {3}, {3}),
        (Expression("place", STAR, place="middle"), set(), set()),
        (Expression("order", STAR, rank=2, side="left"), {1}, {1}),
        (Expression("order", STAR, rank=2, side="right"), {1}, {1}),
        (Expression("order", STAR, rank=3, side="left"), {2}, {2}),
        (Expression("order", STAR, rank=2, side="top"), {0, 1, 2}, set()),
        (Expression("order", STAR, rank=4, side="left"), set(), set()),
        (Expression("relation", STAR, relation="above", anchor=Description(shape="box")), {0, 1, 2}, {0, 1}),
        (Expression("relation", STAR, relation="closest to", anchor=Description(shape="box")), {0, 1}, set()),
        (Expression("relation", STAR, relation="farthest from", anchor=Description(shape="box")), {2}, {2}),
        (Expression("relation", STAR, relation="next to", anchor=Description(size="large")), {1}, set()),
        (Expression("relation", STAR, relation="left of", anchor=Description(size="large")), {0, 1}, {0, 1}),
        (Expression("relation", STAR, relation="below", anchor=Description(shape="box")), set(), set()),
        (Expression("relation", STAR, relation="right of", anchor=Description(size="large")), set(), set()),
    ],
)
def test_meaning_of_each_kind(expression, generous, strict):
    assert describes(STARS, expression, slack=MARGIN) == generous
    assert describes(STARS, expression, slack=-MARGIN) == strict
    assert is_unambiguous(STARS, expression) == (generous == strict and len(strict) == 1)


def test_relation_to_more_than_one_object_is_ambiguous():
    scene = make_scene(
        ("small red plain star", 0.5, 0.1),
        ("small red plain star", 0.5, 0.9),
        ("small blue plain box", 0.4, 0.5),
        ("small blue plain box", 0.6, 0.5),
    )
    above_box = Expression("relation", STAR, relation="above", anchor=Description(shape="box"))
    assert describes(scene, above_box) == {0}
    assert not is_unambiguous(scene, above_box)  # above which box?
    assert is_unambiguous(replace(scene, objects=scene.objects[:3]), above_box)


def test_anchor_is_not_related_to_itself():
    scene = make_scene(("small red plain star", 0.5, 0.1), ("small blue plain star", 0.5, 0.9))
    above = Expression("relation", STAR, relation="above", anchor=Description(colour="blue"))
    assert describes(scene, above, slack=MARGIN) == {0}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (Expression("colour", STAR), "kind is 'colour'"),
        (Expression("relation", STAR, relation="inside", anchor=Description(shape="box")), "relation is 'inside'"),
    ],
)
def test_unknown_meaning_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        describes(STARS, expression)
