"""The reader of REFER's layout: what it reads, and what it refuses by name."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from magnet_fast.data.datasets.refer import IMAGE_FOLDERS, Refer

from .layout import small_instances, small_ref, small_refs, write_root


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("folder", IMAGE_FOLDERS)
@pytest.mark.parametrize("name", ["refs(unc).p", "refs(unc).json"])
def test_reads_both_layouts_and_formats(tmp_path, folder, name):
    refer = Refer(write_root(tmp_path / "root", image_folder=folder, name=name))
    assert refer.splits == ("train", "val")
    first, second = refer.refs("train")
    assert (first.ref_id, first.ann_ids, first.image_id, first.category_id) == (1, (70,), 7, 1)
    assert [sentence.raw for sentence in first.sentences] == ["Left man", "man on left"]
    assert first.sentences[0].sent == "left man" and first.sentences[0].tokens == ("left", "man")
    assert first.sentences[0].kind is None
    assert refer.image_path(7) == tmp_path / "root" / folder / "a.jpg"
    assert refer.image_size(7) == (20, 30)
    assert refer.categories == {1: "person"}
    assert np.array_equal(refer.mask(first), rectangle(3, 9, 2, 10))
    assert np.array_equal(refer.mask(second), rectangle(10, 15, 20, 25))
    assert refer.mask(first).dtype == np.uint8


def test_other_data_sets_and_splitters(tmp_path):
    root = write_root(tmp_path / "root", name="refs(umd).p", dataset="refcocog")
    assert len(Refer(root, "refcocog", "umd").refs("val")) == 1
    with pytest.raises(FileNotFoundError, match=r"refcocog holds none of refs\(google\)\.p"):
        Refer(root, "refcocog", "google")
    with pytest.raises(FileNotFoundError, match="refcoco does not exist"):
        Refer(root)


def test_grefcoco_targets(tmp_path):
    refs = [
        small_ref(1, [70, 71], 7, "both of them"),
        small_ref(2, [-1], 7, "the elephant"),
        small_ref(3, -1, 7, "the giraffe"),
    ]
    refer = Refer(write_root(tmp_path / "root", refs=refs, name="grefs(unc).json", dataset="grefcoco"), "grefcoco")
    both, nothing, nothing_either = refer.refs("train")
    assert both.ann_ids == (70, 71) and nothing.ann_ids == nothing_either.ann_ids == ()
    assert np.array_equal(refer.mask(both), rectangle(3, 9, 2, 10) | rectangle(10, 15, 20, 25))
    for ref in (nothing, nothing_either):
        assert refer.mask(ref).shape == (20, 30) and not refer.mask(ref).any()


def test_every_form_of_segmentation(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (20, 30), dtype=np.uint8)
    mask[0, 0] = 0  # uncompressed counts below begin with a run of zeros
    packed = coco_mask.encode(np.asfortranarray(mask))
    packed["counts"] = packed["counts"].decode()
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    forms = [packed, [packed], {"size": [20, 30], "counts": counts}, [{"size": [20, 30], "counts": counts}]]
    instances = small_instances()
    for form in forms:
        instances["annotations"][0]["segmentation"] = form
        root = write_root(tmp_path / "root", instances=instances)
        refer = Refer(root)
        assert np.array_equal(refer.mask(refer.refs("train")[0]), mask)
        shutil.rmtree(root)


def test_several_polygons_are_merged_and_degenerate_ones_left_out(tmp_path):
    instances = small_instances()
    instances["annotations"][0]["segmentation"] += [[5, 5, 12, 5, 12, 8, 5, 8], [1, 1, 2, 2]]
    refer = Refer(write_root(tmp_path / "root", instances=instances))
    assert np.array_equal(refer.mask(refer.refs("train")[0]), rectangle(3, 9, 2, 10) | rectangle(5, 8, 5, 12))


def test_absent_split_names_those_present(tmp_path):
    refer = Refer(write_root(tmp_path / "root"))
    with pytest.raises(ValueError, match=r"split is 'testA'; .*refs\(unc\)\.p has train, val"):
        refer.refs("testA")


@pytest.mark.parametrize(
    "segmentation",
    [..., None, [], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], {}, {"counts": [], "size": [20, 30]}],
)
def test_annotation_without_polygon_is_left_out_and_named(tmp_path, segmentation):
    instances = small_instances()
    instances["annotations"][1]["segmentation"] = segmentation
    if segmentation is ...:
        del instances["annotations"][1]["segmentation"]
    with pytest.warns(UserWarning, match=r"in doubt: 1 record: no polygon .*json: annotation 71 \(.*ref_id 2\)"):
        refer = Refer(write_root(tmp_path / "root", instances=instances))
    assert [ref.ref_id for ref in refer.refs("train")] == [1]


def test_a_ref_keeps_those_of_its_annotations_that_have_a_polygon(tmp_path):
    instances, refs = small_instances(), small_refs()
    instances["annotations"][1]["segmentation"] = []
    refs[0]["ann_id"] = [70, 71]
    with pytest.warns(UserWarning, match=r"2 records: no polygon .*annotation 71 \(.*ref_id 1\)"):
        refer = Refer(write_root(tmp_path, instances=instances, refs=refs))
    assert [ref.ann_ids for ref in refer.refs("train")] == [(70,)]
    assert np.array_equal(refer.mask(refer.refs("train")[0]), rectangle(3, 9, 2, 10))


def test_unused_annotation_without_polygon_does_not_matter(tmp_path):
    instances = small_instances()
    instances["annotations"].append({"id": 99, "image_id": 7, "category_id": 1, "segmentation": []})
    assert len(Refer(write_root(tmp_path / "root", instances=instances)).refs("train")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 99}, r"refs\(unc\)\.p: ref_id 2 names ann_id 99, which instances\.json does not hold"),
        ({"ann_id": [70, 99]}, "ref_id 2 names ann_id 99"),
        ({"image_id": 99}, "ref_id 2 names image_id 99, which instances.json does not hold"),
        ({"split": ""}, "ref_id 2 has split ''; expected text"),
        ({"split": None}, "ref_id 2 has split null; expected text"),
        ({"ref_id": "2"}, "has ref_id '2'; expected a whole number, without quotes"),
        ({"image_id": 7.5}, "ref_id 2 has image_id 7.5; expected a whole number"),
        ({"ann_id": [70, -1]}, r"ref_id 2 has ann_id \[70, -1\]; expected annotations, or \[-1\] alone"),
        (
            {"sentences": [{"sent_id": 3, "raw": "woman", "exist": "no"}]},
            "ref_id 2: sent_id 3 has exist 'no'; expected true or false",
        ),
        ({"sentences": "woman"}, "ref_id 2 has sentences 'woman'; expected a list"),
        ({"sentences": [{"sent_id": 3}]}, "ref_id 2: sentence .* lacks raw"),
        ({"sentences": [{"sent_id": 3, "raw": 5}]}, "ref_id 2: sent_id 3 has raw 5; expected text"),
        ({"sentences": [None]}, "ref_id 2: sentence null lacks raw"),
        ({"ref_id": True}, "has ref_id true; expected a whole number"),
        ({"image_id": 2**63}, f"ref_id 2 has image_id {2**63}; expected a whole number"),
        ({"ann_id": "71"}, "ref_id 2 has ann_id '71'; expected a whole number, without quotes, in every file"),
        ({"ann_id": None}, "ref_id 2 has ann_id null; expected a whole number"),
        ({"ann_id": []}, r"ref_id 2 has ann_id \[\]; expected annotations, or \[-1\] alone"),
        ({"ann_id": [[71]]}, r"ref_id 2 has ann_id \[71\]; expected a whole number"),
        ({"ann_id": 80}, "ref_id 2 of image_id 7 names ann_id 80; instances.json says image_id 8 of it"),
        ({"split": "v\x1b[31mal"}, r"ref_id 2 has split 'v\\x1b\[31mal'; expected text without control characters"),
        ({"category_id": {}}, r"ref_id 2 has category_id \{\}; expected a whole number"),
    ],
)
def test_broken_ref_is_named(tmp_path, change, message):
    refs = small_refs()
    refs[1] |= change
    with pytest.raises(ValueError, match=message):
        Refer(write_root(tmp_path / "root", refs=refs))


@pytest.mark.parametrize("key", ["ref_id", "ann_id", "image_id", "split", "sentences"])
def test_ref_without_a_key(tmp_path, key):
    refs = small_refs()
    del refs[1][key]
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p: ref_id (2|\(record 1\)) lacks {key}"):
        Refer(write_root(tmp_path / "root", refs=refs))


@pytest.mark.parametrize("refs", [[], {}, {"refs": []}, "text", [3]])
def test_refs_of_another_form(tmp_path, refs):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: (holds|record 0)"):
        Refer(write_root(tmp_path / "root", refs=refs))


def test_broken_json_is_named(tmp_path):
    root = write_root(tmp_path / "root", name="refs(unc).json")
    whole = (root / "refcoco" / "refs(unc).json").read_text()
    (root / "refcoco" / "refs(unc).json").write_text(whole[:-5])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.json: not valid JSON"):
        Refer(root)
    (root / "refcoco" / "refs(unc).json").write_text(whole)
    (root / "refcoco" / "instances.json").write_bytes(b'{"images": [\xff')
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON"):
        Refer(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("annotations"), "lacks the list 'annotations'"),
        (lambda content: content.update(images={}), "lacks the list 'images'"),
        (lambda content: content["images"][1].pop("height"), "image 8 lacks 'height'"),
        (
            lambda content: content["annotations"][0].pop("id"),
            "annotation record 0 has id null; expected a whole number",
        ),
    ],
)
def test_instances_of_another_form(tmp_path, change, message):
    instances = copy.deepcopy(small_instances())
    change(instances)
    with pytest.raises(ValueError, match=rf"instances\.json: {message}"):
        Refer(write_root(tmp_path / "root", instances=instances))


def test_a_name_longer_than_the_system_has_is_an_absent_file(tmp_path):
    instances = copy.deepcopy(small_instances())
    root = write_root(tmp_path / "root")
    instances["images"][-1]["file_name"] = f"{'o' * 5000}.jpg"
    next(root.rglob("instances.json")).write_text(json.dumps(instances))
    with pytest.raises(FileNotFoundError, match=r"image o+\.jpg .*instances\.json is not in"):
        Refer(root).image_path(instances["images"][-1]["id"])


def test_absent_files(tmp_path):
    root = write_root(tmp_path / "root")
    (root / "images" / "mscoco" / "images" / "train2014" / "b.jpg").unlink()
    refer = Refer(root)
    with pytest.raises(FileNotFoundError, match=r"image b\.jpg \(image_id 8\) of .*instances\.json is not in"):
        refer.image_path(8)
    with pytest.raises(ValueError, match="image_id is 9"):
        refer.image_path(9)
    (root / "refcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json does not exist"):
        Refer(root)
    shutil.rmtree(root / "images")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        Refer(root)


def test_undecodable_segmentation_is_named(tmp_path):
    instances = small_instances()
    instances["annotations"][0]["segmentation"] = {"counts": [600], "size": [30, 20]}
    refer = Refer(write_root(tmp_path / "root", instances=instances))
    with pytest.raises(
        ValueError, match=r"annotation 70 cannot be decoded: RLE has size \[30, 20\]; the image has \[20, 30\]"
    ):
        refer.mask(refer.refs("train")[0])
    instances["annotations"][0]["segmentation"] = [["a", 1, 2, 3, 4, 5]]
    refer = Refer(write_root(tmp_path / "other", instances=instances))
    with pytest.raises(ValueError, match="annotation 70 cannot be decoded"):
        refer.mask(refer.refs("train")[0])
