"""REFER's relatives on disk: RefCLEF, gRefCOCO, R-RefCOCO, own folders, and where each keeps its images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from magnet_fast.data import ExpressionDataset, Refer, Tokenizer
from magnet_fast.data.check import check_data

from .layout import small_instances, small_ref, small_refs, write_root


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


LEFT, RIGHT = rectangle(3, 9, 2, 10), rectangle(10, 15, 20, 25)


def grefs() -> list[dict[str, Any]]:
    """As grefs(unc).json has them: ann_id and category_id are lists."""
    both = small_ref(1, [70, 71], 7, "both of them", "the two people") | {"category_id": [1, 1]}
    mixed = small_ref(2, [71, 70], 7, "a person and a dog") | {"category_id": [1, 18]}
    one = small_ref(3, [71], 7, "the woman", split="testA") | {"category_id": [1]}
    none = small_ref(4, [-1], 8, "the elephant", "a giraffe") | {"category_id": [-1]}
    return [both, mixed, one, none]


def test_grefcoco(tmp_path: Path) -> None:
    refer = Refer(write_root(tmp_path, refs=grefs(), name="grefs(unc).json", dataset="grefcoco"), "grefcoco")
    both, mixed, none = refer.refs("train")
    (one,) = refer.refs("testA")
    assert refer.splits == ("train", "testA") and refer.source.name == "grefs(unc).json"
    assert [ref.ann_ids for ref in (both, mixed, one, none)] == [(70, 71), (71, 70), (71,), ()]
    assert [ref.category_id for ref in (both, mixed, one, none)] == [1, None, 1, None]
    assert np.array_equal(refer.mask(both), LEFT | RIGHT) and np.array_equal(refer.mask(one), RIGHT)
    assert [[sentence.exists for sentence in ref.sentences] for ref in (both, none)] == [[True] * 2, [False] * 2]
    assert refer.mask(none).shape == (20, 30) and not refer.mask(none, none.sentences[0]).any()
    dataset = ExpressionDataset(refer, "train", Tokenizer(), 16)
    items = [dataset[index] for index in range(len(dataset))]
    assert [item["exists"] for item in items] == [True, True, True, False, False]
    assert [bool(item["mask"].any()) for item in items] == [True, True, True, False, False]
    assert check_data(tmp_path, "grefcoco").problems == []


def test_grefcoco_leaves_crowds_out(tmp_path: Path) -> None:
    instances = small_instances()
    runs = {"size": [20, 30], "counts": [0, 600]}
    instances["annotations"][1] |= {"iscrowd": 1, "segmentation": runs}
    with pytest.warns(UserWarning, match=r"left out 1 record: its annotations are all crowds \(.*ref_id 3\)"):
        refer = Refer(
            write_root(tmp_path, instances=instances, refs=grefs(), name="grefs(unc).json", dataset="grefcoco"),
            "grefcoco",
        )
    both = refer.refs("train")[0]
    assert both.ann_ids == (70,) and np.array_equal(refer.mask(both), LEFT) and both.sentences[0].exists
    assert refer.splits == ("train",) and refer.skipped.reasons == {"its annotations are all crowds": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = check_data(tmp_path, "grefcoco")
    assert report.problems == [] and report.notes[0].startswith("left out 1 record: its annotations are all crowds")
    # RefCOCO's readers know nothing of crowds.
    other = Refer(write_root(tmp_path / "other", instances=instances))
    assert other.mask(other.refs("train")[1]).all()


@pytest.mark.parametrize("spelling", [(True, False), (1, 0)])
@pytest.mark.parametrize("dataset", ["rrefcoco", "rrefcoco+", "rrefcocog"])
def test_r_refcoco(tmp_path: Path, dataset: str, spelling: tuple[Any, Any]) -> None:
    refs = small_refs()
    refs[0]["sentences"][0]["exist"], refs[0]["sentences"][1]["exist"] = spelling
    folder = "images/mscoco/train2014"
    refer = Refer(write_root(tmp_path, refs=refs, dataset=dataset, image_folder=folder), dataset)
    ref = refer.refs("train")[0]
    present, absent = ref.sentences
    assert (present.exists, absent.exists) == (True, False)
    assert all(sentence.exists for sentence in refer.refs("train")[1].sentences)  # absent = true
    assert np.array_equal(refer.mask(ref, present), LEFT) and not refer.mask(ref, absent).any()
    assert np.array_equal(refer.mask(ref), LEFT)  # the target is kept, for scoring by ref
    assert refer.image_path(7) == tmp_path / folder / "a.jpg"
    assert check_data(tmp_path, dataset).problems == []


def test_refclef(tmp_path: Path) -> None:
    """Masks are lists of compressed RLE, images of SAIAPR TC-12, three test splits, and two splitters."""
    instances = small_instances()
    for annotation, mask in zip(instances["annotations"], (LEFT, RIGHT, LEFT | RIGHT), strict=True):
        runs = coco_mask.encode(np.asfortranarray(mask))
        annotation["segmentation"] = [{"size": runs["size"], "counts": runs["counts"].decode()}]
    splits = ("testC", "testA", "train")
    refs = [record | {"split": split} for record, split in zip(small_refs(), splits, strict=True)]
    root = write_root(
        tmp_path, instances=instances, refs=refs, dataset="refclef", name="refs(berkeley).p",
        image_folder="images/saiapr_tc-12",
    )  # fmt: skip
    refer = Refer(root, "refclef", "berkeley")
    assert refer.splits == ("train", "testA", "testC")
    for split, mask in zip(splits, (LEFT, RIGHT, LEFT | RIGHT), strict=True):
        (ref,) = refer.refs(split)
        assert np.array_equal(refer.mask(ref), mask)
    assert refer.image_path(8) == root / "images/saiapr_tc-12/b.jpg"
    assert check_data(root, "refclef", "berkeley").problems == []


@pytest.mark.parametrize("folder", ["images", "images/train2017", "images/train2014", "images/my flowers"])
def test_own_folders_and_splits(tmp_path: Path, folder: str) -> None:
    refs = small_refs()
    for record, split in zip(refs, ("fold 2", "val", "fold 1"), strict=True):
        record["split"] = split
    refer = Refer(write_root(tmp_path, refs=refs, image_folder=folder, dataset="flowers"), "flowers")
    assert refer.splits == ("val", "fold 2", "fold 1")  # the field's first, then the data's own in their order
    assert len(refer.refs("fold 1")) == 1
    assert refer.image_path(7) == tmp_path / folder / "a.jpg"
    assert check_data(tmp_path, "flowers").problems == []


def test_several_folders_in_one(tmp_path: Path) -> None:
    write_root(tmp_path, image_folder="images/2014")
    (tmp_path / "images/2017").mkdir()
    (tmp_path / "images/2014/b.jpg").rename(tmp_path / "images/2017/b.jpg")
    refer = Refer(tmp_path)
    assert [refer.image_path(one).parent.name for one in (7, 8)] == ["2014", "2017"]


def test_names_with_folders_in_them(tmp_path: Path) -> None:
    instances = small_instances()
    for image in instances["images"]:
        image["file_name"] = f"2017/{image['file_name']}"
    refer = Refer(write_root(tmp_path, instances=instances, image_folder="photos/2017"), images="photos")
    assert refer.image_path(7) == tmp_path / "photos/2017/a.jpg"


def test_images_are_named(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", image_folder="photos")
    with pytest.raises(FileNotFoundError, match=r"no image folder: neither .*train2014 nor .*; name it by images="):
        Refer(root)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / "photos/b.jpg").rename(elsewhere / "b.jpg")
    for images in (["photos", elsewhere], ("photos", str(elsewhere))):
        refer = Refer(root, images=images)
        assert [refer.image_path(one).parent for one in (7, 8)] == [root / "photos", elsewhere]
    only = Refer(root, images="photos")
    with pytest.raises(
        FileNotFoundError, match=r"b\.jpg \(image_id 8\) of .* is not in .*photos; put it there, or name"
    ):
        only.image_path(8)
    with pytest.raises(FileNotFoundError, match="these folders do not exist: .*root/nowhere"):
        Refer(root, images=["photos", "nowhere"])
    problems = check_data(root, images="photos").problems
    assert any(problem.startswith("1 image absent: image b.jpg") for problem in problems)


def test_the_folder_of_images_is_looked_in_and_named_whatever_it_holds(tmp_path: Path) -> None:
    """Names may hold the folders in it; its own name is what an absent picture's owner looks for."""
    instances = small_instances()
    for image in instances["images"]:
        image["file_name"] = f"2014/{image['file_name']}"
    refer = Refer(write_root(tmp_path, instances=instances, image_folder="images/2014", dataset="own"), "own")
    assert refer.image_path(7) == tmp_path / "images/2014/a.jpg"
    (tmp_path / "images/2014/b.jpg").unlink()
    expected = rf"is not in {tmp_path}/images/2014 nor {tmp_path}/images; put it there, or name its folder by images="
    with pytest.raises(FileNotFoundError, match=expected):
        refer.image_path(8)
    (told,) = (problem for problem in check_data(tmp_path, "own").problems if "absent" in problem)
    assert told.count("put it there") == 1
