"""Written scenes: the same bytes for the same arguments, REFER's layout, masks as drawn, split rules."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from magnet_fast.data import Refer
from magnet_fast.data.scenes import assign_splits, describe_scene, write_scenes, writing
from magnet_fast.data.scenes.drawing import COLOURS, SHAPES, SIZES, TEXTURES, Scene, SceneObject, draw_scene


class IndependentRefer:
    """The data as a REFER user reads it: plain pickle, COCO's JSON, pycocotools."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "images" / "mscoco" / "images" / "train2014"
        self.refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
        instances = json.loads((root / "refcoco" / "instances.json").read_text())
        self.images = {image["id"]: image for image in instances["images"]}
        self.annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
        self.categories = {category["id"]: category["name"] for category in instances["categories"]}

    def mask(self, annotation: dict) -> np.ndarray:
        image = self.images[annotation["image_id"]]
        assert isinstance(annotation["segmentation"][0], list)  # polygons
        packed = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
        return np.sum(coco_mask.decode(packed), axis=2)


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


PUBLISHED = {  # SHA-256 of pictures and masks, and of the files, as the first version wrote them
    "easy": (
        "e77d57e475ab7ea8acf25af8ecd6a9b2ff2f39fa33e51ca97a24ba72e12d4ff8",
        "26ec568c85a7d9a6a966a86fbaca0bf2ddf7e45702024850db301c1697512d9c",
        "fa72cb055408b6dcdf2c3fafd676d86d0092387a8fae8e871c29d93f5f39744d",
        "0c8047b2c51b6f3a52af4faeeed31beef2dd110f76b2af4b833285082eb08604",
    ),
    "hard": (
        "de27d32f987743c0fa25ecb51f9395a4366d24fd2b7dad648ef82881cf361ad1",
        "81fd666dfba6f75ff094e2c289a4b5327f80385a8903e41b3f3be4894b7e3d7c",
        "09c06a2924690c92d9b31b1ad41b51f2824d8906c1c0569d8953351c1f10b8b6",
        "04563eecfdcefe387f852fcf24bc6bbbe61fa11af070fe16fcc9e5f89855d9f7",
    ),
}


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_scenes_of_a_seed_never_change(tmp_path, level):
    """The shipped weights and published scores are of these scenes. JPEG's bytes are the library's own affair."""
    pictures = hashlib.sha256()
    for number in range(24):
        drawn = describe_scene(9, number, level, ("train", "val", "testA", "testB")[number % 4], 96)
        pictures.update(drawn.picture.tobytes() + drawn.masks.tobytes())
    found = digest(write_scenes(tmp_path / "scenes", 24, 9, level, 96))
    files = ("refcoco/refs(unc).p", "refcoco/instances.json", "scenes.json")
    assert (pictures.hexdigest(), *(found[name] for name in files)) == PUBLISHED[level]


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_same_arguments_give_the_same_bytes(tmp_path, level, monkeypatch):
    first = digest(write_scenes(tmp_path / "a", 13, 5, level))
    monkeypatch.setattr(writing, "_CHUNK", 4)  # several pieces of work for the two processes
    assert digest(write_scenes(tmp_path / "b", 13, 5, level, workers=2)) == first
    assert len(first) == 13 + 3
    other = digest(write_scenes(tmp_path / "c", 13, 6, level))
    assert not set(first.values()) & set(other.values())


def test_levels_differ_and_images_are_distinct(easy_root, hard_root):
    easy = [value for name, value in digest(easy_root).items() if name.endswith(".jpg")]
    hard = [value for name, value in digest(hard_root).items() if name.endswith(".jpg")]
    assert len({*easy, *hard}) == len(easy) + len(hard) == 180


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_readable_as_refer(level, request):
    data = IndependentRefer(request.getfixturevalue(f"{level}_root"))
    low, high = (2, 4) if level == "easy" else (5, 10)
    objects = Counter(annotation["image_id"] for annotation in data.annotations.values())
    assert set(objects) == set(data.images) and low <= min(objects.values()) <= max(objects.values()) <= high
    assert tuple(data.categories.values()) == SHAPES
    sentence_ids = []
    for ref in data.refs:
        annotation = data.annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"] and annotation["category_id"] == ref["category_id"]
        assert data.images[ref["image_id"]]["file_name"] == ref["file_name"]
        assert [sentence["sent_id"] for sentence in ref["sentences"]] == ref["sent_ids"]
        assert 1 <= len(ref["sentences"]) <= 3
        for sentence in ref["sentences"]:
            assert set(sentence) == {"sent_id", "raw", "sent", "tokens", "kind"}
            assert sentence["tokens"] == sentence["sent"].split() == sentence["raw"].split()
        sentence_ids += ref["sent_ids"]
    assert sentence_ids == list(range(1, len(sentence_ids) + 1))
    assert [ref["ref_id"] for ref in data.refs] == list(range(1, len(data.refs) + 1))
    per_image = Counter(ref["image_id"] for ref in data.refs)
    assert set(per_image) == set(data.images) and set(per_image.values()) <= {2, 3, 4}
    for image in data.images.values():
        with Image.open(data.folder / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (128, 128) and picture.mode == "RGB"


@pytest.mark.parametrize(("level", "seed"), [("easy", 3), ("hard", 4)])
def test_written_masks_equal_those_drawn(level, seed, request):
    data = IndependentRefer(request.getfixturevalue(f"{level}_root"))
    splits = assign_splits(len(data.images), seed)
    for number in range(0, len(data.images), 5):
        drawn = describe_scene(seed, number, level, splits[number])
        annotations = [one for one in data.annotations.values() if one["image_id"] == number + 1]
        assert len(annotations) == len(drawn.masks)
        for annotation, mask, item in zip(annotations, drawn.masks, drawn.scene.objects, strict=True):
            assert np.array_equal(data.mask(annotation), mask)
            assert annotation["area"] == mask.sum()
            left, top, width, height = annotation["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
            assert mask[top].any() and mask[:, left].any()
            assert mask[top + height - 1].any() and mask[:, left + width - 1].any()
            assert annotation["attributes"]["shape"] == item.shape == data.categories[annotation["category_id"]]
        with Image.open(data.folder / data.images[number + 1]["file_name"]) as picture:
            error = np.abs(np.asarray(picture).astype(int) - drawn.picture)
        assert error.mean() < 6  # JPEG thins out the noise


def test_our_reader_agrees(hard_root):
    data, refer = IndependentRefer(hard_root), Refer(hard_root)
    assert refer.splits == ("train", "val", "testA", "testB")
    ours = {ref.ref_id: ref for split in refer.splits for ref in refer.refs(split)}
    assert len(ours) == len(data.refs)
    for record in data.refs:
        ref = ours[record["ref_id"]]
        assert ref.split == record["split"] and ref.ann_ids == (record["ann_id"],)
        assert [(s.raw, s.kind) for s in ref.sentences] == [(s["raw"], s["kind"]) for s in record["sentences"]]
        assert np.array_equal(refer.mask(ref), data.mask(data.annotations[record["ann_id"]]))


def test_splits_are_by_image_and_of_their_kinds(easy_root, hard_root):
    for root, last in ((easy_root, "place"), (hard_root, "relation")):
        data = IndependentRefer(root)
        split_of: dict[int, set[str]] = {}
        kinds: dict[str, set[str]] = {}
        for ref in data.refs:
            split_of.setdefault(ref["image_id"], set()).add(ref["split"])
            kinds.setdefault(ref["split"], set()).update(sentence["kind"] for sentence in ref["sentences"])
        assert all(len(splits) == 1 for splits in split_of.values())
        count = Counter(split for splits in split_of.values() for split in splits)
        total = len(data.images)
        assert count == {"val": total // 10, "testA": total // 20, "testB": total // 20, "train": total * 8 // 10}
        assert kinds["testA"] == {"attribute"} and kinds["testB"] == {last}


@pytest.mark.parametrize("images", [4, 5, 7, 20, 1000])
def test_every_split_has_an_image(images):
    count = Counter(assign_splits(images, 0))
    assert count.total() == images and set(count) == {"train", "val", "testA", "testB"}
    assert count["testA"] == count["testB"] == max(1, round(images / 20))


def test_share_of_each_kind():
    kinds = Counter(
        expression.kind
        for number in range(300)
        for referent in describe_scene(1, number, "hard", "train", 64).referents
        for expression in referent.expressions
    )
    for kind, share in {"attribute": 0.35, "place": 0.25, "order": 0.15, "relation": 0.25}.items():
        assert abs(kinds[kind] / kinds.total() - share) < 0.05


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_objects_are_large_enough_and_show(level):
    sides: dict[str, list[int]] = {"small": [], "large": []}
    values: Counter[str] = Counter()
    for number in range(60):
        drawn = describe_scene(2, number, level, "train")
        assert not (drawn.masks.sum(axis=0) > 1).any()  # a pixel belongs to one object
        for item, mask in zip(drawn.scene.objects, drawn.masks, strict=True):
            alone, _, _ = draw_scene(Scene((item,), level, 0), 128)
            whole = draw_scene(Scene((item,), level, 0), 128)[1][0]
            assert mask.sum() >= 0.6 * whole.sum() and not (mask & ~whole).any()
            assert alone.shape == (128, 128, 3)
            rows, columns = np.nonzero(whole)
            sides[item.size].append(max(np.ptp(rows), np.ptp(columns)) + 1)
            values.update((item.shape, item.colour, item.size, item.texture))
    assert min(sides["small"]) >= 14 and max(sides["small"]) < min(sides["large"])
    assert set(values) == {*SHAPES, *COLOURS, *SIZES, *TEXTURES}


def test_image_size_scales_the_scene():
    item = SceneObject("star", "red", "large", "striped", 0.5, 0.4, 0.3)
    small = draw_scene(Scene((item,), "easy", 0), 64)[1][0]
    picture, large, shown = draw_scene(Scene((item,), "easy", 0), 256)
    assert picture.shape == (256, 256, 3) and shown.tolist() == [1.0]
    assert abs(large.sum() / 16 - small.sum()) < 0.06 * small.sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_drawn_within_its_window(shape):
    """Rotation must not cut a shape off at the edge of the window that it is drawn in."""
    areas = []
    for rotation in np.linspace(0.0, 6.2, 9):
        item = SceneObject(shape, "red", "large", "plain", 0.5, 0.5, 0.4, rotation=rotation)
        areas.append(int(draw_scene(Scene((item,), "easy", 0), 128)[1].sum()))
    assert min(areas) > 0.95 * max(areas) > 300


def test_colours_differ_from_background_and_one_another():
    values = np.array(list(COLOURS.values()), dtype=float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=2)
    assert distances[~np.eye(len(values), dtype=bool)].min() > 80
    assert (values.max(axis=1) - values.min(axis=1)).min() > 90  # backgrounds are dull: 32 at most


def test_unknown_shape_is_refused():
    item = SceneObject("blob", "red", "large", "plain", 0.5, 0.5, 0.4)
    with pytest.raises(ValueError, match="shape is 'blob'"):
        draw_scene(Scene((item,), "easy", 0), 64)


def test_same_arguments_again_keep_what_is_there(tmp_path):
    out = write_scenes(tmp_path / "deep" / "scenes", 4, 0, "easy", 64)
    image = next((out / "images/mscoco/images/train2014").iterdir())
    before = image.stat().st_mtime_ns
    assert write_scenes(out, 4, 0, "easy", 64) == out
    assert image.stat().st_mtime_ns == before
    for change in ({"images": 5}, {"seed": 1}, {"level": "hard"}, {"image_size": 96}):
        arguments = {"images": 4, "seed": 0, "level": "easy", "image_size": 64} | change
        with pytest.raises(FileExistsError, match="holds other scenes"):
            write_scenes(out, **arguments)
    assert len(digest(out)) == 7


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no embedded scenes"):
        write_scenes(tmp_path / "out", 4, 0)
    with pytest.raises(FileExistsError, match="holds no embedded scenes"):
        write_scenes(tmp_path / "out" / "thesis.txt", 4, 0)
    assert digest(tmp_path / "out").keys() == {"thesis.txt"}


def test_empty_folder_and_link_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert write_scenes(tmp_path / "link", 4, 0, image_size=64) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and len(digest(tmp_path / "empty")) == 7


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writing, "_write_annotations", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path / "out", 4, 0, image_size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": 3}, ValueError, "images is 3; expected at least 4"),
        ({"images": 4.0}, TypeError, "images is 4.0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"image_size": 32}, ValueError, "image_size is 32; expected 64 to 4096 pixels"),
        ({"image_size": 100_000}, ValueError, "image_size is 100000; expected 64 to 4096 pixels"),
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"negatives": -1}, ValueError, "negatives is -1; expected at least 0"),
        ({"negatives": True}, TypeError, "negatives is True"),
        ({"several": 0.5}, TypeError, "several is 0.5; expected an int"),
        ({"level": "medium"}, ValueError, "level is 'medium'; expected one of easy, hard"),
    ],
)
def test_arguments_are_checked(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        write_scenes(tmp_path / "out", **({"images": 4, "seed": 0} | change))
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_only_where_wanted(tmp_path, capsys):
    write_scenes(tmp_path / "a", 4, 0, image_size=64)
    assert capsys.readouterr() == ("", "")
    write_scenes(tmp_path / "b", 4, 0, image_size=64, progress=True)
    output = capsys.readouterr()
    assert output.out == "" and "Drawing scenes" in output.err
