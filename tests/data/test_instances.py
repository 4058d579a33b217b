"""instances.json is checked for values: unique ids, sizes, names of files; and pictures that EXIF turns are counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magnet_fast.data import ExpressionDataset, Refer, Tokenizer
from magnet_fast.data.check import check_data
from magnet_fast.data.datasets.base import BrokenRecordsError

from .layout import small_instances, small_ref, small_refs, write_root


def write(root: Path, change: Any = None, refs: Any = None) -> Path:
    instances = small_instances()
    if change:
        change(instances)
    return write_root(root, instances=instances, refs=refs, dataset="mine")


def refused(root: Path, *parts: str) -> None:
    """Opening and check both name every part, opening in one line."""
    with pytest.raises(BrokenRecordsError) as caught:
        Refer(root, "mine")
    told = "\n".join(check_data(root, "mine").problems)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value) and part in told, (part, str(caught.value), told)


@pytest.mark.parametrize(("height", "width"), [("20", "30"), (20.0, 30.0), (" 20 ", "30.0"), (20, "30")])
def test_sizes_of_plain_meaning_are_read(tmp_path: Path, height: Any, width: Any) -> None:
    root = write(tmp_path, lambda content: content["images"][0].update(height=height, width=width))
    with pytest.warns(UserWarning, match=r"a size not written as a whole number.*instances\.json: image 7"):
        reader = Refer(root, "mine")
    assert reader.image_size(7) == (20, 30) and all(type(side) is int for side in reader.image_size(7))
    sample = ExpressionDataset(reader, "train", Tokenizer(), 16)[0]
    assert sample["mask"].any() and sample["size"] == (20, 30)
    (problem,) = check_data(root, "mine").problems
    assert "instances.json: image 7 has height" in problem


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null; expected a whole number of pixels"), (64.5, "64.5; expected a whole"), ("wide", "'wide'"),
        (True, "true; expected a whole"), (float("nan"), "nan; expected a whole"), ([30], "[30]; expected a whole"),
        (0, "0; expected 1 to 1000000 pixels"), (-30, "-30; expected 1 to"), ("-30", "'-30'; expected 1 to"),
        (2**31, f"{2**31}; expected 1 to"), ("٣٠", "expected a whole"),
    ],
)  # fmt: skip
def test_other_sizes_are_refused_by_name(tmp_path: Path, value: Any, said: str) -> None:
    root = write(tmp_path, lambda content: content["images"][0].update(width=value))
    refused(root, "instances.json: image 7 has width", said)


def test_a_size_that_memory_would_not_hold(tmp_path: Path) -> None:
    root = write(tmp_path, lambda content: content["images"][0].update(width=900_000, height=900_000))
    refused(root, "instances.json: image 7 has 900000 x 900000 pixels; expected at most 178956970")


@pytest.mark.parametrize(
    "name", [None, 7, "", "../a.jpg", "/etc/passwd", "x/../../a.jpg", "a\x1b[31m.jpg", "a\x00.jpg", "\ud800"]
)
def test_names_of_files_stay_in_the_folder(tmp_path: Path, name: Any) -> None:
    root = write(tmp_path, lambda content: content["images"][0].update(file_name=name))
    refused(root, "instances.json: image 7 names the file")
    assert "\x1b" not in str(check_data(root, "mine").problems)


def twice(key: str, **change: Any) -> Any:
    return lambda content: content[key].append({**content[key][0], **change})


def test_annotation_id_twice(tmp_path: Path) -> None:
    other = {"image_id": 8, "segmentation": [[0, 0, 30, 0, 30, 20, 0, 20]]}
    refused(
        write(tmp_path, twice("annotations", **other)), "annotation id 70 stands more than once, with other contents"
    )


def test_image_id_twice(tmp_path: Path) -> None:
    root = write(tmp_path, twice("images", file_name="b.jpg"))
    refused(root, "image id 7 stands more than once", "refs(unc).p: ref_id 1", "2 records: broken image")


def test_ref_id_twice(tmp_path: Path) -> None:
    root = write(tmp_path, refs=[*small_refs(), small_ref(1, 80, 8, "the other")])
    refused(root, "ref_id 1 stands more than once, with other contents")


def test_the_same_record_twice_is_left_out_once(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for key in ("images", "annotations"):
            content[key].append(copy.deepcopy(content[key][0]))

    root = write(tmp_path, change, [*small_refs(), small_refs()[0]])
    with pytest.warns(UserWarning, match="left out 3 records: the same record once more"):
        assert len(Refer(root, "mine").refs("train")) == 2
    report = check_data(root, "mine")
    assert report.problems == [] and "annotation id 70" in report.notes[0]


def test_what_no_ref_names_does_not_stop_opening(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"] += [{"id": 50, "file_name": None}, {"id": 51}, "x"]
        content["annotations"] += [{"id": 90, "image_id": 7}, {"id": 90, "image_id": 8}, {"id": None}]

    root = write(tmp_path, change)
    with pytest.warns(UserWarning, match="in doubt: 5 records: broken, but no ref names it"):
        assert len(Refer(root, "mine").refs("train")) == 2
    (problem,) = check_data(root, "mine").problems
    assert "image 50 names the file null" in problem and "annotation id 90 stands more than once" in problem


def test_category_id_twice(tmp_path: Path) -> None:
    root = write(tmp_path, twice("categories", name="dog"))
    with pytest.warns(UserWarning, match="category id 1 is 'person' and 'dog'; the first is used"):
        assert Refer(root, "mine").categories == {1: "person"}
    assert any("category id 1" in problem for problem in check_data(root, "mine").problems)


def test_categories_are_not_needed(tmp_path: Path) -> None:
    root = write(tmp_path, lambda content: content.pop("categories"))
    assert Refer(root, "mine").categories == {} and check_data(root, "mine").problems == []


def test_an_annotation_of_another_image(tmp_path: Path) -> None:
    root = write(tmp_path, refs=[*small_refs(), small_ref(9, [70, 80], 7, "both")])
    refused(root, "ref_id 9 of image_id 7 names ann_id 80; instances.json says image_id 8 of it")
    root = write(tmp_path / "text", lambda content: content["annotations"][0].update(image_id="7"))
    refused(root, "ref_id 1 of image_id 7 names ann_id 70; instances.json says image_id '7' of it; write ids without")


@pytest.mark.parametrize(
    ("key", "kind", "name"), [("annotations", "annotation", "ann_id 70"), ("images", "image", "image_id 7")]
)
def test_ids_that_are_text_in_one_file(tmp_path: Path, key: str, kind: str, name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content[key][0]["id"] = str(content[key][0]["id"])

    number = name.split()[1]
    refused(
        write(tmp_path, change), f"names {name}, which instances.json holds as the text '{number}'; write ids without"
    )
    refs = small_refs()
    refs[0].update(ann_id="70", image_id="7", ref_id="1")
    with pytest.raises(ValueError, match=r"has ref_id '1'; expected a whole number, without quotes, in every file"):
        Refer(write(tmp_path / "refs", refs=refs), "mine")


def test_whole_floats_are_ids(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(id=70.0, image_id=7.0)

    refs = small_refs()
    refs[0].update(ref_id=1.0, image_id=7.0, ann_id=70.0)
    ref = Refer(write(tmp_path, change, refs), "mine").refs("train")[0]
    assert (ref.ref_id, ref.image_id, ref.ann_ids) == (1, 7, (70,)) and type(ref.ref_id) is type(ref.image_id) is int


@pytest.mark.parametrize(
    ("crowd", "kept"), [("0", True), (0, True), (False, True), (None, True), ("1", False), (1.0, False)]
)
def test_crowds_by_value(tmp_path: Path, crowd: Any, kept: bool) -> None:
    instances = small_instances()
    instances["annotations"][0]["iscrowd"] = crowd
    root = write_root(tmp_path, instances=instances, name="grefs(unc).json", dataset="grefcoco")
    refs = check_data(root, "grefcoco").counts["train"][0]
    assert refs == 1 + kept
    instances["annotations"][0]["iscrowd"] = "many"
    root = write_root(tmp_path / "other", instances=instances, name="grefs(unc).json", dataset="grefcoco")
    with pytest.raises(ValueError, match=r"instances\.json: annotation 70 has iscrowd 'many'; expected 0 or 1"):
        Refer(root, "grefcoco")


@pytest.mark.parametrize(
    "segmentation",
    [[2, 3, 10, 3, 10, 9, 2, 9], [[2, 3], [10, 3], [10, 9], [2, 9]], [[[2, 3, 10, 3, 10, 9, 2, 9]]]],
)
def test_nestings_of_plain_meaning(tmp_path: Path, segmentation: Any) -> None:
    expected = np.zeros((20, 30), dtype=np.uint8)
    expected[3:9, 2:10] = 1
    root = write(tmp_path, lambda content: content["annotations"][0].update(segmentation=segmentation))
    reader = Refer(root, "mine")
    assert np.array_equal(reader.mask(reader.refs("train")[0]), expected)


@pytest.mark.parametrize("segmentation", ["x", 5, [{"x": 1}, 5], [[2, 3, [10], 3, 10]], [[[[[[2, 3]]]]]]])
def test_nestings_of_no_meaning(tmp_path: Path, segmentation: Any) -> None:
    root = write(tmp_path, lambda content: content["annotations"][0].update(segmentation=segmentation))
    refused(root, "instances.json: annotation 70 cannot be decoded", "expected [[x1, y1, x2, y2, ...], ...]")


def test_a_key_that_stands_twice_in_a_record(tmp_path: Path) -> None:
    root = write(tmp_path)
    path = root / "mine/instances.json"
    path.write_text(path.read_text().replace('"width": 30', '"width": 40, "width": 30', 1))
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON \(a dict holds the key 'width' twice\)"):
        Refer(root, "mine")


def test_a_link_that_leads_to_itself_hides_no_other_fault(tmp_path: Path) -> None:
    root = write(tmp_path)
    folder = root / "images/mscoco/images/train2014"
    (folder / "a.jpg").unlink()
    (folder / "a.jpg").symlink_to("a.jpg")
    (root / "images/loop").symlink_to("loop")
    (folder / "b.jpg").write_bytes(b"")
    absent, unreadable = check_data(root, "mine").problems
    assert absent.startswith("1 image absent: image a.jpg") and unreadable.endswith("b.jpg is empty (0 bytes)")


def test_check_names_pictures_that_training_would_refuse(tmp_path: Path) -> None:
    root = write(tmp_path, lambda content: content["images"][0].update(file_name="a.tif"))
    Image.new("F", (30, 20)).save(root / "images/mscoco/images/train2014/a.tif")
    (problem,) = check_data(root, "mine").problems
    assert problem.startswith("1 image unreadable: ") and "a.tif has pixels of mode F, whose range is not" in problem


@pytest.mark.parametrize("folder", ["images/a/b", "images/mscoco/images/train2017", "images/flowers/2024/may"])
def test_images_in_folders_within_folders(tmp_path: Path, folder: str) -> None:
    root = write_root(tmp_path, image_folder=folder, dataset="flowers")
    (root / "images/deep/er/and/deeper").mkdir(parents=True)
    assert Refer(root, "flowers").image_path(7) == root / folder / "a.jpg"
    assert check_data(root, "flowers").problems == []


def save_turned(path: Path, size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (200, 30, 30)).save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_that_viewers_turn_are_counted(tmp_path: Path, suffix: str) -> None:
    root = write(tmp_path, lambda content: content["images"][0].update(file_name=f"phone.{suffix}"))
    folder = root / "images/mscoco/images/train2014"
    save_turned(folder / f"phone.{suffix}", (30, 20), 3)
    report = check_data(root, "mine")
    assert report.problems == []
    (note,) = report.notes
    assert note.startswith("1 image with an EXIF orientation other than 1: ") and f"phone.{suffix}: 3" in note
    save_turned(folder / f"phone.{suffix}", (30, 20), 1)
    assert check_data(root, "mine").notes == []
    save_turned(folder / f"phone.{suffix}", (20, 30), 6)  # instances.json gives the size of the picture turned
    (problem,) = check_data(root, "mine").problems
    assert "is 30x20, instances.json says 20x30" in problem and "its EXIF orientation is 6" in problem
    assert "save the picture turned, without the tag" in problem


def test_a_broken_exif_block_or_a_huge_picture_does_not_stop_check(tmp_path: Path) -> None:
    root = write(tmp_path)
    folder = root / "images/mscoco/images/train2014"
    Image.new("RGB", (30, 20)).save(folder / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    (folder / "b.jpg").write_bytes(b"P6 60000 60000 255\n")
    (problem,) = check_data(root, "mine").problems
    assert problem.startswith("1 image unreadable: ") and "b.jpg has 3600000000 pixels; expected at most" in problem
