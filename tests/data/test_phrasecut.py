"""PhraseCut's reader, on small files of its format."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from magnet_fast.data.datasets.phrasecut import PhraseCut

HEIGHT, WIDTH = 40, 60
SQUARE = [[5, 4], [20, 4], [20, 18], [5, 18]]
TRIANGLE = [[30.7, 20.2], [55.9, 22.0], [40.1, 38.5]]
STRIP = [[45, 3], [57, 3], [57, 9], [45, 9]]


def task(task_id: str, image_id: int, phrase: str, polygons: Any, kind: str = "attribute") -> dict[str, Any]:
    return {
        "task_id": task_id,
        "image_id": image_id,
        "ann_ids": [1001],  # Visual Genome's: fewer than the instances
        "instance_boxes": [[0, 0, 5, 5] for _ in polygons],
        "Polygons": polygons,
        "phrase": phrase,
        "phrase_structure": {
            "name": phrase.split()[-1] if phrase.split() else "",
            "attributes": [],
            "relation_ids": [],
            "relation_descriptions": [["on", "table"]],
            "type": kind,
        },
    }


def small_tasks() -> dict[str, list[dict[str, Any]]]:
    return {
        "train": [
            task("7__1", 7, "red  cups", [[SQUARE], [TRIANGLE, STRIP]]),
            task("7__2", 7, "cup on table", [[STRIP]], "relation"),
        ],
        "miniv": [task("8__1", 8, "sky", [[SQUARE]], "name")],
        "extra_own": [task("8__9", 8, "blue sky", [[TRIANGLE]], "verbose")],
    }


def image_records() -> list[dict[str, Any]]:
    return [
        {"image_id": i, "coco_id": None, "flickr_id": 1, "width": WIDTH, "height": HEIGHT, "url": "", "split": split}
        for i, split in ((7, "train"), (8, "miniv"), (9, "test"))
    ]


def write(root: Path, tasks: dict[str, Any], images: Any = None, folder: str = "VGPhraseCut_v0/images") -> Path:
    data = root / "VGPhraseCut_v0"
    data.mkdir(parents=True)
    records = image_records() if images is None else images
    (data / "image_data_split.json").write_text(json.dumps(records))
    for split, content in tasks.items():
        (data / f"refer_{split}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        without = [{key: one[key] for key in ("task_id", "image_id", "phrase")} for one in small_tasks()["train"]]
        (data / f"refer_input_{split}.json").write_text(json.dumps(without))
    (root / folder).mkdir(parents=True)
    for image_id in (7, 8):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / folder / f"{image_id}.jpg")
    return root


def test_reads_splits_phrases_and_kinds(tmp_path):
    reader = PhraseCut(write(tmp_path, small_tasks()))
    assert reader.splits == ("train", "miniv", "extra_own")
    cups, cup = reader.refs("train")
    assert (cups.image_id, cups.category_id, cups.split) == (7, None, "train")
    assert len(cups.ann_ids) == 2 and len(cup.ann_ids) == 1
    everything = [ref for split in reader.splits for ref in reader.refs(split)]
    instances = [one for ref in everything for one in ref.ann_ids]
    assert len(set(instances)) == len(instances) == 5
    assert [reader.task_ids[ref.ref_id] for ref in everything] == ["7__1", "7__2", "8__1", "8__9"]
    (sentence,) = cups.sentences
    assert (sentence.raw, sentence.sent, sentence.tokens) == ("red  cups", "red cups", ("red", "cups"))
    assert [ref.sentences[0].kind for ref in everything] == ["attribute", "relation", "name", "verbose"]
    assert all(ref.sentences[0].exists for ref in everything)
    assert reader.image_size(9) == (HEIGHT, WIDTH)
    assert reader.extra(cups, sentence) == {} and reader.skipped.reasons == {}
    assert reader.source == tmp_path / "VGPhraseCut_v0"
    with pytest.raises(ValueError, match="split is 'test'; .* has train, miniv, extra_own"):
        reader.refs("test")


def test_masks_are_the_union_of_instances_outlines_included(tmp_path):
    reader = PhraseCut(write(tmp_path, small_tasks()))
    cups, cup = reader.refs("train")
    mask = reader.mask(cups, cups.sentences[0])
    assert mask.dtype == np.uint8 and mask.shape == (HEIGHT, WIDTH) and set(np.unique(mask)) == {0, 1}
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[3:10, 45:58] = 1  # both ends of the outline
    assert np.array_equal(reader.mask(cup), expected)
    # COCO's drawing of the same polygons, away from borders
    flat = [[float(value) for point in polygon for value in point] for polygon in (SQUARE, TRIANGLE, STRIP)]
    other = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, HEIGHT, WIDTH)))
    padded = np.pad(other, 2, mode="edge")
    around = np.stack([padded[y : y + HEIGHT, x : x + WIDTH] for y in range(5) for x in range(5)])
    clear = around.min(0) == around.max(0)
    assert clear.mean() > 0.6 and other[clear].sum() > 150
    assert np.array_equal(mask[clear], other[clear])
    assert mask.sum() > other.sum()


def test_images_in_visual_genomes_folders_or_as_named(tmp_path):
    reader = PhraseCut(write(tmp_path / "a", small_tasks(), folder="images/VG_100K_2"))
    assert reader.image_path(7) == tmp_path / "a/images/VG_100K_2/7.jpg"
    with pytest.raises(FileNotFoundError, match="image 9.jpg is in none of .*VG_100K_2"):
        reader.image_path(9)
    write(tmp_path / "b", small_tasks(), folder="elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no folder of images: none of .*VG_100K.* name it by images="):
        PhraseCut(tmp_path / "b")
    for images in (tmp_path / "b/elsewhere", [str(tmp_path / "a"), tmp_path / "b/elsewhere"]):
        assert PhraseCut(tmp_path / "b", images=images).image_path(8) == tmp_path / "b/elsewhere/8.jpg"
    with pytest.raises(FileNotFoundError, match="these folders do not exist: .*nowhere"):
        PhraseCut(tmp_path / "b", images=[tmp_path / "b/elsewhere", tmp_path / "nowhere"])


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks image_data_split.json or"):
        PhraseCut(tmp_path)
    write(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="any refer_<split>.json"):
        PhraseCut(tmp_path)


def test_the_other_name_of_the_list_of_images(tmp_path):
    write(tmp_path, small_tasks())
    folder = tmp_path / "VGPhraseCut_v0"
    (folder / "image_data_split.json").rename(folder / "image_data_split3000.json")
    assert len(PhraseCut(tmp_path).refs("train")) == 2


def test_what_is_left_out_is_counted_and_said(tmp_path):
    tasks = small_tasks()
    tasks["train"] += [
        task("7__3", 7, "nothing", []),
        task("7__4", 7, "a point", [[[[3, 3]]], [[]]]),
        task("7__1", 7, "again", [[SQUARE]]),
        task("7__5", 7, "a line and a square", [[[[3, 30], [9, 30]]], [SQUARE, [[1, 1]]]]),
    ]
    with pytest.warns(UserWarning, match=r"left out 2 records: no polygon \(.*7__3; .*7__4\).*occurred before.*7__1"):
        reader = PhraseCut(write(tmp_path, tasks))
    assert reader.skipped.reasons == {
        "no polygon": 2,
        "polygon of fewer than two points": 3,
        "task_id occurred before": 1,
    }
    assert len(reader.skipped.examples["no polygon"]) == 2
    last = reader.refs("train")[-1]
    assert reader.task_ids[last.ref_id] == "7__5" and len(last.ann_ids) == 2
    mask = reader.mask(last)
    assert mask[30, 3:10].all() and mask[10, 10] and not mask[1, 1]
    only = {"val": [task("7__3", 7, "nothing", [])]}
    with pytest.raises(ValueError, match="no record can be used; left out 1 record: no polygon"):
        PhraseCut(write(tmp_path / "only", only))


BAD_TASKS = [
    ("task_id", None, r"refer_train.json: task_id .record 1. has task_id null; expected text"),
    ("image_id", "7", "task_id 7__2 has image_id '7'; expected a whole number, without quotes"),
    ("image_id", 70, "task_id 7__2 names image_id 70, which image_data_split.json does not hold"),
    ("phrase", "  ", "task_id 7__2 has phrase '  '; expected text"),
    ("Polygons", None, "has Polygons null; expected list"),
    ("Polygons", [SQUARE], r"Polygons hold \[5, 4\]; expected a polygon's points"),
    ("Polygons", [7], "Polygons hold 7; expected a list of polygons per instance"),
    ("Polygons", [[[[1, 2], [3]]]], "expected a polygon's points"),
    ("Polygons", [[[[1, 2], [3, "4"], [5, 6]]]], "expected numbers"),
    ("Polygons", [[[[1, 2, 3], [3, 4, 5]]]], "expected a polygon's points"),
    ("Polygons", [[[[1, 2], [3, math.nan], [5, 6]]]], "not finite"),
    ("Polygons", [[[[1, 2], [3, 1e12], [5, 6]]]], "more than 3 times that side outside"),
    ("phrase_structure", "name", "phrase_structure is 'name'; expected a dict"),
    ("phrase_structure", {"type": 3}, "phrase_structure is .*; expected a dict whose type is text"),
    ("phrase_structure", {}, None),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_TASKS)
def test_bad_records_are_named(tmp_path, key, value, message):
    tasks = small_tasks()
    tasks["train"][1][key] = value
    write(tmp_path, tasks)
    if message is None:
        assert len(PhraseCut(tmp_path).refs("train")) == 2
        return
    with pytest.raises(ValueError, match=message):
        PhraseCut(tmp_path)
    del tasks["train"][1][key]
    (tmp_path / "VGPhraseCut_v0/refer_train.json").write_text(json.dumps(tasks["train"]))
    if key != "phrase_structure":
        with pytest.raises(ValueError, match=f"lacks '{key}'"):
            PhraseCut(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a JSON list"),
        ("", "it is empty"),
        ("[{}", r"not valid JSON \(after record 0|lacks 'task_id'"),
        ("[3]", "record 0. is 3; expected a dict"),
        ('[{"a": }]', r"not valid JSON \(record 0"),
        ("[] []", "something follows the list"),
        ("[]", None),
    ],
)
def test_broken_json_is_named(tmp_path, text, message):
    tasks = {**small_tasks(), "val": text}
    write(tmp_path, tasks)
    if message is None:
        assert PhraseCut(tmp_path).splits == ("train", "miniv", "extra_own")
        return
    with pytest.raises(ValueError, match=f"refer_val.json: .*{message}"):
        PhraseCut(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "image_id 7 has height 0"),
        ({"width": 3.5}, "image_id 7 has width 3.5; expected a whole number of pixels"),
        ({"image_id": True}, "has image_id true; expected a whole number"),
    ],
)
def test_bad_image_records_are_named(tmp_path, change, message):
    images = copy.deepcopy(image_records())
    images[0].update(change)
    with pytest.raises(ValueError, match=message):
        PhraseCut(write(tmp_path, small_tasks(), images))
