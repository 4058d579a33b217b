"""The reader of regions named by commands, on small files of Talk2Car-RegSeg's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magnet_fast.data.datasets.regions import Regions

HEIGHT, WIDTH = 9, 16


def commands() -> dict[str, Any]:
    return {
        "val": {"3": {"command": "stop.", "img": "img_val_3.jpg", "referred_object": [1, 2, 3, 4]}},
        "train": {
            "0": {"command": "park next to  the bus", "img": "img_train_0.jpg"},
            "12": {"command": "turn left", "img": "img_train_0.jpg"},
        },
    }


def region(split: str, index: int) -> np.ndarray:
    return (np.random.default_rng([len(split), index]).random((HEIGHT, WIDTH)) < 0.4).astype(np.uint8)


def write(root: Path, content: Any = None, masks: str = "mask_image_bin", name: str = "talk2car.json") -> Path:
    folder = root / "talk2car"
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    (folder / masks).mkdir(exist_ok=True)
    content = commands() if content is None else content
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for split, index in (("val", 3), ("train", 0), ("train", 12)):
        # any value that is not 0 belongs to the region
        pixels = region(split, index) * np.random.default_rng(0).integers(1, 256, (HEIGHT, WIDTH)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / masks / f"gt_img_ann_{split}_{index}.png")
    for image in ("img_val_3.jpg", "img_train_0.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "imgs" / image)
    return root


@pytest.mark.parametrize("masks", ["mask_image_bin", "val_masks_new", "new_masks", "masks", "."])
def test_reads_commands_masks_and_images(tmp_path, masks):
    reader = Regions(write(tmp_path, masks=masks))
    assert reader.splits == ("train", "val") and reader.source == tmp_path / "talk2car/talk2car.json"
    first, second = reader.refs("train")
    (stop,) = reader.refs("val")
    assert [first.ref_id, second.ref_id, stop.ref_id] == [0, 12, 3]
    assert first.image_id == second.image_id != stop.image_id
    assert first.sentences[0].raw == "park next to  the bus" and first.sentences[0].sent == "park next to the bus"
    assert first.sentences[0].tokens == ("park", "next", "to", "the", "bus")
    for ref in (first, second, stop):
        mask = reader.mask(ref, ref.sentences[0])
        assert mask.dtype == np.uint8 and np.array_equal(mask, region(ref.split, ref.ref_id))
        assert reader.image_size(ref.image_id) == (HEIGHT, WIDTH)
        assert len(ref.ann_ids) == 1 and ref.category_id is None
    assert reader.image_path(stop.image_id) == tmp_path / "talk2car/imgs/img_val_3.jpg"
    assert reader.extra(first, first.sentences[0]) == {} and reader.skipped.reasons == {}


def test_several_files_and_what_is_no_file_of_commands(tmp_path):
    write(tmp_path, {"train": commands()["train"]})
    write(tmp_path, {"val": commands()["val"]}, name="talk2car_val.json")
    for name, content in (("other.json", {"a": 1}), ("list.json", [1]), ("empty.json", {}), ("deep.json", {"a": {}})):
        (tmp_path / "talk2car" / name).write_text(json.dumps(content))
    reader = Regions(tmp_path)
    assert reader.splits == ("train", "val") and reader.source == tmp_path / "talk2car"
    write(tmp_path, name="talk2car_z.json")
    with pytest.raises(ValueError, match="talk2car_z.json holds split 'val', which .*talk2car_val.json holds, too"):
        Regions(tmp_path)


def test_images_option(tmp_path):
    write(tmp_path)
    (tmp_path / "talk2car/imgs").rename(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        Regions(tmp_path)
    reader = Regions(tmp_path, images=tmp_path / "photos")
    assert reader.image_path(reader.refs("val")[0].image_id) == tmp_path / "photos/img_val_3.jpg"
    (tmp_path / "photos/img_val_3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="image img_val_3.jpg is in none of .*photos"):
        reader.image_path(reader.refs("val")[0].image_id)
    with pytest.raises(ValueError, match="image_id is 9"):
        reader.image_path(9)
    with pytest.raises(ValueError, match="image_id is 9"):
        reader.image_size(9)


def test_commands_without_mask_are_counted_and_said(tmp_path):
    content = commands()
    content["train"]["13"] = {"command": "go on", "img": "img_train_13.jpg"}
    with pytest.warns(UserWarning, match="left out 1 record: no mask file .*gt_img_ann_train_13.png"):
        reader = Regions(write(tmp_path, content))
    assert reader.skipped.reasons == {"no mask file": 1} and len(reader.refs("train")) == 2
    with pytest.raises(ValueError, match="no record can be used; left out 1 record: no mask file"):
        Regions(write(tmp_path / "none", {"test": {"0": {"command": "go", "img": "a.jpg"}}}))


def test_masks_that_cannot_be_used_are_named(tmp_path):
    reader = Regions(write(tmp_path, {**commands(), "test": {}}))  # a split may be empty
    first, second = reader.refs("train")
    folder = tmp_path / "talk2car/mask_image_bin"
    Image.new("L", (WIDTH, HEIGHT + 1)).save(folder / "gt_img_ann_train_12.png")
    with pytest.raises(ValueError, match=r"train_12.png has 10 x 16 .* image img_train_0.jpg has 9 x 16"):
        reader.mask(second)
    (folder / "gt_img_ann_train_0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="gt_img_ann_train_0.png: not a readable picture"):
        reader.mask(first)


@pytest.mark.parametrize(
    ("index", "record", "message"),
    [
        ("x", {"command": "go", "img": "a.jpg"}, "command x of train: the index is 'x'; expected a whole number"),
        ("-1", {"command": "go", "img": "a.jpg"}, "the index is '-1'"),
        ("5", ["go"], "talk2car.json: command 5 of train is .*go.*; expected a dict"),
        ("5", {"command": "go"}, "command 5 of train lacks 'img'"),
        ("5", {"command": " ", "img": "a.jpg"}, "command 5 of train has command ' '; expected text"),
        ("5", {"command": "go", "img": 7}, "has img 7; expected text"),
        (
            "5",
            {"command": "go", "img": "../../secret.jpg"},
            "names the file '../../secret.jpg'; expected a path",
        ),
        ("5", {"command": "go", "img": "/secret.jpg"}, "names the file '/secret.jpg'"),
    ],
)
def test_bad_records_are_named(tmp_path, index, record, message):
    content = commands()
    content["train"][index] = record
    with pytest.raises(ValueError, match=message):
        Regions(write(tmp_path, content))


def test_absent_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no JSON file of the form {split: {index: {command, img}}}"):
        Regions(tmp_path)
    with pytest.raises(ValueError, match="talk2car.json: not valid JSON"):
        Regions(write(tmp_path, '{"train": '))
