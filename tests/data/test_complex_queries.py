"""The reader of complex queries, on small files of RIS-CQ's, OpenPSG's and DuMoGa's formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from magnet_fast.data.datasets.complex_queries import ComplexQueries
from magnet_fast.data.datasets.scene_nodes import GRID, NODES

HEIGHT, WIDTH = 2 * GRID, 3 * GRID
SEGMENTS = (7, 3648962, 70000, 256)  # red alone, all three, three with a small red, green alone


def segments(image: int) -> np.ndarray:
    """Which of SEGMENTS each pixel belongs to; -1 for none. Rectangles that differ from image to image."""
    place = np.full((HEIGHT, WIDTH), -1)
    place[: 100 + image] = 0
    place[50:200, 30:180] = 1
    place[60:90, 200 + image : 341] = 2
    place[210:, :33] = 3
    return place


def save_panoptic(path: Path, image: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for place, segment in enumerate(SEGMENTS):
        pixels[segments(image) == place] = (segment % 256, segment // 256 % 256, segment // 65536)
    Image.fromarray(pixels).save(path)


def query(image: int, segment: int, sentence: str = "The cup is on  the table.\n\nIt is red.") -> dict[str, Any]:
    return {
        "file_name": f"train2017/{image:012}.jpg",
        "sentence": sentence,
        "pan_seg_file": f"panoptic_train2017/{image:012}.png",
        "id": segment,
    }


def scene(image: int, places: tuple[int, ...], relations: Any = None) -> dict[str, Any]:
    record = {
        "file_name": f"train2017/{image:012}.jpg",
        "pan_seg_file_name": f"panoptic_train2017/{image:012}.png",
        "segments_info": [{"id": SEGMENTS[place], "category_id": 1, "area": 1} for place in places],
    }
    return record if relations is None else {**record, "relations": relations}


def write(root: Path, content: Any = None, name: str = "sub_ris.json", place: str = "images") -> Path:
    folder = root / "ris_cq"
    folder.mkdir(parents=True, exist_ok=True)
    content = [query(5, SEGMENTS[1]), query(31, SEGMENTS[2]), query(5, SEGMENTS[3])] if content is None else content
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for image in (5, 31):
        save_panoptic(root / place / f"panoptic_train2017/{image:012}.png", image)
        (root / place / "train2017").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / place / f"train2017/{image:012}.jpg")
    return root


@pytest.mark.parametrize("place", ["images", "images/mscoco/images", "ris_cq"])
def test_reads_sentences_masks_and_images(tmp_path, place):
    reader = ComplexQueries(write(tmp_path, place=place))
    assert reader.splits == ("sub_ris",) and reader.source == tmp_path / "ris_cq/sub_ris.json"
    refs = reader.refs("sub_ris")
    assert [(ref.image_id, ref.ann_ids) for ref in refs] == [(5, (3648962,)), (31, (70000,)), (5, (256,))]
    assert len({ref.ref_id for ref in refs}) == 3
    (sentence,) = refs[0].sentences
    assert sentence.raw.count("\n") == 2 and sentence.sent == "The cup is on the table. It is red."
    assert sentence.tokens[:2] == ("The", "cup") and sentence.exists and sentence.kind is None
    for ref in refs:
        mask = reader.mask(ref, ref.sentences[0])
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, segments(ref.image_id) == SEGMENTS.index(ref.ann_ids[0]))
        assert reader.image_size(ref.image_id) == (HEIGHT, WIDTH)
        assert reader.image_path(ref.image_id) == tmp_path / place / f"train2017/{ref.image_id:012}.jpg"
        assert reader.extra(ref, ref.sentences[0]) == {}


def test_a_file_is_a_split(tmp_path):
    write(tmp_path, [query(5, 7)], name="val.json")
    write(tmp_path, [query(31, 7)], name="train.json")
    write(tmp_path, {"a": 1}, name="relations.json")
    write(tmp_path, [{"other": 1}], name="other.json")
    reader = ComplexQueries(tmp_path)
    assert reader.splits == ("train", "val")
    assert [ref.image_id for ref in reader.refs("val")] == [5] and reader.refs("val")[0].split == "val"


def test_images_option_and_panoptic_folders(tmp_path):
    write(tmp_path, place="coco")
    with pytest.raises(FileNotFoundError, match="image train2017/000000000005.jpg is in none of .*ris_cq"):
        ComplexQueries(tmp_path).image_path(5)
    reader = ComplexQueries(tmp_path, images=tmp_path / "coco")
    assert reader.image_path(5) == tmp_path / "coco/train2017/000000000005.jpg"
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/panoptic_train2017").rename(tmp_path / "coco/annotations/panoptic_train2017")
    assert reader.mask(reader.refs("sub_ris")[0]).any()
    (tmp_path / "coco/annotations/panoptic_train2017/000000000031.png").unlink()
    with pytest.raises(FileNotFoundError, match="panoptic PNG panoptic_train2017/000000000031.png is in none of"):
        reader.mask(reader.refs("sub_ris")[1])
    with pytest.raises(ValueError, match="image_id is 6"):
        reader.image_path(6)


def test_panoptic_pngs_that_cannot_be_used_are_named(tmp_path):
    reader = ComplexQueries(write(tmp_path, [query(5, 99), query(31, 7)]))
    absent, other = reader.refs("sub_ris")
    with pytest.raises(ValueError, match="ref_id 0: segment 99 is not in .*000000000005.png"):
        reader.mask(absent)
    path = tmp_path / "images/panoptic_train2017/000000000031.png"
    Image.new("L", (WIDTH, HEIGHT)).save(path)
    with pytest.raises(ValueError, match="31.png is a picture of mode L; expected RGB or"):
        reader.mask(other)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="31.png: not a readable picture"):
        reader.mask(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 0}, "sub_ris.json: record 1 has id 0; expected 1 to 16777215"),
        ({"id": 1 << 24}, "record 1 has id 16777216"),
        ({"id": "7"}, "record 1 has id '7'; expected int"),
        ({"id": True}, "record 1 has id true; expected int"),
        ({"sentence": "\n"}, "record 1 has sentence .*; expected text"),
        ({"file_name": None}, "record 1 has file_name null; expected text"),
        ({"file_name": "train2017/cat.jpg"}, "expected COCO's number"),
        ({"file_name": "../000000000005.jpg"}, "names the file '../000000000005.jpg'; expected a path within"),
        (
            {"file_name": "val2017/000000000005.jpg"},
            "names val2017/.*; a record before names train2017/",
        ),
        ({"pan_seg_file": "/etc/5.png"}, "names the file '/etc/5.png'"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    content = [query(5, 7), {**query(5, 7), **change}]
    with pytest.raises(ValueError, match=message):
        ComplexQueries(write(tmp_path, content))


def test_absent_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no JSON file that is a list of {file_name, sentence"):
        ComplexQueries(tmp_path)
    with pytest.raises(ValueError, match=r"sub_ris.json: not valid JSON \(record 0"):
        ComplexQueries(write(tmp_path, '[{"sentence": '))
    with pytest.raises(ValueError, match="record 0 lacks 'file_name'"):
        ComplexQueries(write(tmp_path, [{"sentence": "a cup"}]))


def covered(image: int, place: int) -> np.ndarray:
    """Share of each cell, by a plain mean: the image is a whole number of grids."""
    mask = (segments(image) == place).astype(np.float64)
    return mask.reshape(GRID, HEIGHT // GRID, GRID, WIDTH // GRID).mean((1, 3))


def test_true_nodes_and_edges(tmp_path):
    graph = [scene(5, (2, 0, 1, 3), [[0, 2, 9], [3, 3, 1], [2, 1, 4]]), scene(31, (1,), [])]
    write(tmp_path, {"data": graph, "thing_classes": []}, name="psg.json")
    reader = ComplexQueries(write(tmp_path))
    first, second, _ = reader.refs("sub_ris")
    extra = reader.extra(first, first.sentences[0])
    assert set(extra) == {"proposals", "edges"}
    assert extra["proposals"].shape == (NODES, GRID, GRID) and extra["proposals"].dtype == torch.float32
    for node, place in enumerate((2, 0, 1, 3)):
        np.testing.assert_allclose(extra["proposals"][node], covered(5, place), atol=1e-6)
    assert not extra["proposals"][4:].any()
    assert extra["edges"].dtype == torch.bool and extra["edges"].shape == (NODES, NODES)
    assert {tuple(pair) for pair in extra["edges"].nonzero().tolist()} == {(0, 2), (2, 0), (2, 1), (1, 2)}
    other = reader.extra(second, second.sentences[0])
    assert not other["edges"].any() and not other["proposals"][1:].any() and other["proposals"][0].any()


def test_predicted_nodes_come_first_and_have_features(tmp_path):
    folder = tmp_path / "ris_cq"
    write(tmp_path, {"data": [scene(5, (0,), [])]}, name="psg.json")
    write(tmp_path, [scene(5, (1, 0))], name="for_pan_seg.json")
    write(tmp_path, [scene(31, (3,))], name="for_pan_seg_val.json")
    (folder / "imgSG/train2017").mkdir(parents=True)
    features = np.random.default_rng(0).normal(size=(12, 6))
    for image, count in ((5, 2), (31, 12)):
        content = {"file_name": "", "labels": [1] * count, "roifeatures": features[:count].tolist()}
        (folder / f"imgSG/train2017/{image:012}.jpg.json").write_text(json.dumps(content))
    for image in (5, 31):  # predicted PNGs have a folder of their own, before COCO's
        save_panoptic(folder / f"panseg/panoptic_train2017/{image:012}.png", image + 9)
    reader = ComplexQueries(write(tmp_path))
    first, second, _ = reader.refs("sub_ris")
    extra, other = (reader.extra(ref, ref.sentences[0]) for ref in (first, second))
    assert set(extra) == set(other) == {"proposals", "node_features"}
    np.testing.assert_allclose(extra["proposals"][1], covered(5 + 9, 0), atol=1e-6)
    expected = np.zeros((NODES, 6))
    expected[:2] = features[:2]
    np.testing.assert_allclose(extra["node_features"], expected, rtol=1e-6)
    np.testing.assert_allclose(other["node_features"], features[:NODES], rtol=1e-6)
    assert {name: value.shape for name, value in extra.items()} == {name: value.shape for name, value in other.items()}


def test_records_of_images_without_nodes_are_counted_and_said(tmp_path):
    write(tmp_path, [scene(5, (1, 0))], name="for_pan_seg.json")
    with pytest.warns(UserWarning, match="left out 1 record: no nodes for its image .*record 1: .*000000000031.jpg"):
        reader = ComplexQueries(write(tmp_path))
    assert reader.skipped.reasons == {"no nodes for its image": 1} and len(reader.refs("sub_ris")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected OpenPSG's dict, whose 'data' is a list"),
        ({"data": [3]}, "psg.json: record 0 is 3; expected a dict"),
        ({"data": [{"file_name": "a.jpg"}]}, "psg.json: record 0 lacks 'pan_seg_file_name'"),
        ({"data": [{**scene(5, (1,)), "segments_info": [3]}]}, "segments_info holds 3; expected dicts with an id"),
        ({"data": [{**scene(5, (1,)), "segments_info": [{"id": -1}]}]}, "record 0: segments_info has id -1"),
        ({"data": [scene(5, (1, 2), [[0, 2, 5]])]}, r"record 0 has relation \[0, 2, 5\]; expected .* its 2 segments"),
        ({"data": [scene(5, (1, 2), [[0]])]}, r"has relation \[0\]"),
        ({"data": [scene(5, (1, 2), "none")]}, "has relation 'none'"),
        ({"data": [{**scene(5, (1,)), "pan_seg_file_name": "../a.png"}]}, "names the file '../a.png'"),
    ],
)
def test_bad_scenes_are_named(tmp_path, content, message):
    write(tmp_path, content, name="psg.json")
    with pytest.raises(ValueError, match=message):
        ComplexQueries(write(tmp_path))


@pytest.mark.parametrize("content", [[], {}, {"roifeatures": [[1, 2], [3]]}, {"roifeatures": [["a"]]}])
def test_bad_features_are_named(tmp_path, content):
    write(tmp_path, [scene(5, (1, 0)), scene(31, (1,))], name="for_pan_seg.json")
    (tmp_path / "ris_cq/imgSG").mkdir()
    (tmp_path / "ris_cq/imgSG/000000000005.jpg.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="000000000005.jpg.json: expected a dict whose roifeatures"):
        ComplexQueries(write(tmp_path))
