"""No fault hides another: opening collects them, `data check` tells them all and goes on with what can be used."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from magnet_fast.data import Refer, open_reader
from magnet_fast.data.check import check_data
from magnet_fast.data.datasets.base import BrokenRecordsError

from . import test_complex_queries, test_phrasecut, test_regions
from .layout import small_instances, small_ref, small_refs, write_root


def problems(root: Path, dataset: str = "mine", **settings: Any) -> str:
    return "\n".join(check_data(root, dataset, **settings).problems)


def test_opening_names_the_first_of_each_kind_and_check_the_first_twenty(tmp_path: Path) -> None:
    refs = small_refs() + [small_ref(100 + i, 900 + i, 7, "thing") for i in range(25)]
    refs += [small_ref(200, 70, 99, "thing"), {"ref_id": 201}]
    write_root(tmp_path, refs=refs, dataset="mine")
    with pytest.raises(BrokenRecordsError) as caught:
        Refer(tmp_path, "mine")
    message = str(caught.value)
    assert "25 records: absent annotation (" in message and "ann_id 902" in message and "ann_id 903" not in message
    assert "; and 22 more" in message and "1 record: absent image" in message and "ref_id 201 lacks ann_id" in message
    assert message.endswith("`data check` names more of them") and "\n" not in message
    assert [len(caught.value.reader.refs(split)) for split in ("train", "val")] == [2, 1]
    (tmp_path / "images/mscoco/images/train2014/b.jpg").unlink()
    told = problems(tmp_path)
    assert "25 records: absent annotation" in told and "ann_id 919" in told and "ann_id 920" not in told
    assert "; and 5 more)" in told and "image_id 99" in told and "1 image absent: image b.jpg" in told
    assert check_data(tmp_path, "mine").counts == {"train": (2, 3, 1), "val": (1, 2, 1)}


def test_check_goes_on_to_masks(tmp_path: Path) -> None:
    instances = small_instances()
    instances["annotations"][0]["segmentation"] = [[2, 3, 10, 3, float("nan"), 9]]
    instances["annotations"][2]["segmentation"] = {"size": [20, 30], "counts": [601]}
    refs = [*small_refs(), small_ref(4, 99, 7, "nothing")]
    told = problems(write_root(tmp_path, instances=instances, refs=refs, dataset="mine"))
    assert "names ann_id 99" in told and "2 masks unusable: " in told
    assert "annotation 70 cannot be decoded: polygon holds a coordinate that is not finite" in told
    assert "annotation 80 cannot be decoded: RLE has a run of 601" in told


@pytest.mark.parametrize("sentences", [[], None, [""], [{"sent_id": 5, "raw": "  ", "sent": None}]])
def test_refs_without_words_are_left_out(tmp_path: Path, sentences: Any) -> None:
    refs = small_refs()
    refs[1]["sentences"] = sentences
    root = write_root(tmp_path, refs=refs, name="grefs(unc).json", dataset="grefcoco")
    with pytest.warns(UserWarning, match=r"left out .*1 record: no sentences \(grefs\(unc\)\.json: ref_id 2\)"):
        reader = Refer(root, "grefcoco")
    assert [ref.ref_id for ref in reader.refs("train")] == [1]
    report = check_data(root, "grefcoco")
    assert report.problems == [] and any("no sentences" in note for note in report.notes)


def test_sentences_of_plain_meaning(tmp_path: Path) -> None:
    refs = small_refs()
    refs[0]["sentences"] = ["Left  man", {"raw": "the man"}, {"sent": "a man", "sent_id": "7", "tokens": None}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentences = Refer(write_root(tmp_path, refs=refs)).refs("train")[0].sentences
    assert [one.raw for one in sentences] == ["Left  man", "the man", "a man"]
    assert [one.sent_id for one in sentences] == [0, 1, 7] and sentences[2].tokens == ("a", "man")


def test_other_wrappings_of_refs(tmp_path: Path) -> None:
    wrapped = {"info": {}, "refs": small_refs()}
    assert len(Refer(write_root(tmp_path / "a", refs=wrapped, name="refs(unc).json")).refs("train")) == 2
    lines = write_root(tmp_path / "b", name="refs(unc).json")
    (lines / "refcoco/refs(unc).json").write_text("\n".join(map(json.dumps, small_refs())))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.json: not valid JSON .*one after the other: expected one list"):
        Refer(lines)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_unicode(tmp_path: Path, encoding: str) -> None:
    root = write_root(tmp_path, name="refs(unc).json")
    for path in (root / "refcoco").iterdir():
        path.write_text(path.read_text(), encoding=encoding)
    assert len(Refer(root).refs("train")) == 2
    test_regions.write(root)
    commands = root / "talk2car/talk2car.json"
    commands.write_text(commands.read_text(), encoding=encoding)
    assert open_reader(root, "talk2car").splits == ("train", "val")


def test_json_that_python_cannot_take(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    for content, said in (("[" * 100_000, "recursion"), ("[1" + "0" * 5000 + "]", "limit"), ("", "it is empty")):
        (root / "refcoco/instances.json").write_text(content)
        with pytest.raises(ValueError, match=rf"instances\.json: not valid JSON \(.*{said}"):
            Refer(root)
    (root / "refcoco/instances.json").write_bytes('{"images": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON .*expected UTF-8"):
        Refer(root)


@pytest.mark.parametrize("name", ["instances.json", "refs(unc).p"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"[]", mtime=0), "is compressed (gzip); unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>", "is a web page"),
    ],
    ids=["gzip", "pointer", "page"],
)
def test_other_files_under_the_name_of_data(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    root = write_root(tmp_path, dataset="mine")
    (root / "mine" / name).write_bytes(content)
    told = problems(root)
    assert f"mine/{name}: is " in told and said in told and "invalid" not in told


def test_keys_that_are_bytes(tmp_path: Path) -> None:
    refs = small_refs()
    refs[0] = {key.encode(): value for key, value in refs[0].items()}
    assert "lacks ref_id, ann_id, image_id, split, sentences; it has b'ref_id'" in problems(
        write_root(tmp_path, refs=refs, dataset="mine")
    )


def test_a_value_is_shown_in_bounded_length(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(6):
        deep = [deep] * 6
    told = problems(write_root(tmp_path, refs=[deep, *small_refs()], name="refs(unc).p", dataset="mine"))
    assert "record 0 is [[[[" in told and len(told) < 500


def test_every_absent_or_broken_file_is_named(tmp_path: Path) -> None:
    root = write_root(tmp_path, dataset="mine")
    (root / "mine/refs(unc).p").unlink()
    (root / "mine/instances.json").write_text("{")
    (root / "images/mscoco/images/train2014").rename(root / "elsewhere")
    told = problems(root)
    assert (
        "holds none of refs(unc).p" in told and "instances.json: not valid JSON" in told and "no image folder" in told
    )
    (root / "mine/instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json does not exist.*no image folder.*holds none of"):
        Refer(root, "mine")


def test_a_broken_image_is_told_beside_absent_refs(tmp_path: Path) -> None:
    instances = small_instances()
    instances["images"][0]["width"] = None
    root = write_root(tmp_path, instances=instances, dataset="mine")
    (root / "mine/refs(unc).p").unlink()
    assert "holds none of" in problems(root) and "image 7 has width null" in problems(root)


def test_splits_that_the_field_does_not_know(tmp_path: Path) -> None:
    refs = [*small_refs(), small_ref(9, 80, 8, "it", split="validation")]
    for dataset in ("refcoco", "grefcoco", "flowers"):
        root = write_root(tmp_path / dataset, refs=refs, dataset=dataset)
        assert len(Refer(root, dataset).refs("train")) == 2
        report = check_data(root, dataset)
        assert ("validation" in " ".join(report.problems)) == (dataset != "flowers"), report
        assert ("validation" in " ".join(report.notes)) == (dataset == "flowers"), report


def test_records_of_phrasecut(tmp_path: Path) -> None:
    tasks = test_phrasecut.small_tasks()
    square = [[test_phrasecut.SQUARE]]
    tasks["train"] += [test_phrasecut.task("7__8", 70, "a", square), test_phrasecut.task("7__9", 7, "", square), 3]
    tasks["val"] = "[{"
    images = [*test_phrasecut.image_records(), {"image_id": 9, "height": 1, "width": 2}, {"image_id": 11}]
    images[1] = {**images[1], "width": "60", "height": 40.0}
    test_phrasecut.write(tmp_path, tasks, images)
    told = problems(tmp_path, "VGPhraseCut_v0")
    for part in (
        "refer_val.json: not valid JSON", "task_id 7__8 names image_id 70", "task_id 7__9 has phrase ''",
        "(record 4) is 3; expected a dict",
        "image_id 9 stands twice, with other sizes", "image_id 11 lacks 'height'",
    ):  # fmt: skip
        assert part in told, part
    (tmp_path / "VGPhraseCut_v0/refer_val.json").unlink()
    report = check_data(tmp_path, "VGPhraseCut_v0")
    assert report.counts == {"train": (2, 2, 1), "miniv": (1, 1, 1), "extra_own": (1, 1, 1)}


def test_records_of_regions(tmp_path: Path) -> None:
    content = test_regions.commands()
    content["train"] |= {"5": {"command": ""}, "x": {"command": "go", "img": "a.jpg"}, "012": content["train"]["12"]}
    root = test_regions.write(tmp_path, content)
    Image.new("L", (3, 3)).save(root / "talk2car/mask_image_bin/gt_img_ann_train_12.png")
    told = problems(root, "talk2car")
    for part in ("3 records: unexpected form", "command 5 of train", "the index is 'x'", "the index is '012'"):
        assert part in told, part
    assert "1 mask unusable: " in told and "gt_img_ann_train_12.png has 3 x 3 pixels" in told


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    text = '{"train": {"0": {"command": "go", "img": "a.jpg"}, "0": {"command": "stop", "img": "a.jpg"}}}'
    with pytest.raises(ValueError, match=r"talk2car\.json: not valid JSON \(a dict holds the key '0' twice\)"):
        open_reader(test_regions.write(tmp_path, text), "talk2car", format="regions")


def test_records_of_complex_queries(tmp_path: Path) -> None:
    queries = [test_complex_queries.query(5, segment) for segment in (*test_complex_queries.SEGMENTS[:2], 0)]
    queries += [{**test_complex_queries.query(31, 7), "sentence": 5}, test_complex_queries.query(44, 7)]
    root = test_complex_queries.write(tmp_path, queries)
    told = problems(root, "ris_cq")
    assert "2 records: unexpected form" in told and "record 2 has id 0" in told and "record 3 has sentence 5" in told
    assert "1 image absent: " in told and "000000000044.jpg" in told  # and no panoptic PNG either
    assert "1 mask unusable: panoptic PNG panoptic_train2017/000000000044.png is in none of" in told


def test_one_scene_for_an_image(tmp_path: Path) -> None:
    scenes = [test_complex_queries.scene(5, places, []) for places in ((0, 1), (0, 1), (1, 2))]
    scenes.append(test_complex_queries.scene(31, (0,), [[0, 1, 2]]))
    test_complex_queries.write(tmp_path, {"data": scenes}, name="psg.json")
    told = problems(test_complex_queries.write(tmp_path), "ris_cq")
    assert "record 2 is a second scene of 'train2017/000000000005.jpg', another one" in told
    assert "record 3 has relation [0, 1, 2]" in told
