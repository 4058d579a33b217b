"""Own data in every format: what is imported reads back to the same masks and sentences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from magnet_fast.data import import_data
from magnet_fast.data.check import check_data
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.importing.label_studio import image_names

from . import own
from .own import Object, box_mask, draw_pictures, expected, read, same, save_mask

WRITERS = [own.write_csv, own.write_tsv, own.write_jsonl, own.write_coco, own.write_label_studio, own.write_cvat]
WHOLE = {"val": 0, "test": 0}
SIZE = (20, 30)


@st.composite
def objects(draw: st.DrawFn) -> list[Object]:
    """Some objects in one to three pictures; sentences may stand with several objects, objects with several."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = {}
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        masks = [rng.random(size) < share for share in draw(st.lists(st.floats(0, 1), min_size=1, max_size=3))]
        for mask in masks:
            mask[rng.integers(size[0]), rng.integers(size[1])] = True
            for sentence in draw(st.sets(st.sampled_from(["the cat", "a dog, wet", 'the "Ω" café']), min_size=1)):
                name = f"p {number}.png"
                found[name, mask.tobytes(), sentence] = Object(name, mask, sentence)
    return list(found.values())


@pytest.mark.parametrize("write", WRITERS, ids=lambda one: one.__name__)
@settings(max_examples=12, deadline=None)
@given(objects())
def test_every_format_reads_back(write, tmp_path_factory, found) -> None:
    folder = draw_pictures(tmp_path_factory.mktemp("own"), {one.name: one.mask.shape for one in found})
    import_data(write(folder, found), folder / "out", **WHOLE)
    assert same(read(folder / "out"), expected(found))


def test_a_folder(tmp_path) -> None:
    draw_pictures(tmp_path / "mine/images/red", {"a__b.jpg": SIZE})
    draw_pictures(tmp_path / "mine/images", {"c.png": SIZE})
    left, right = box_mask(SIZE, 1, 2, 5, 6), box_mask(SIZE, 20, 2, 5, 6)
    for name, mask in {"red/a__b__the_left_one": left, "red/a__b__the_one": right, "c__both_of__them": right}.items():
        save_mask(mask, tmp_path / f"mine/masks/{name}.png")
    (tmp_path / "mine/masks/.DS_Store").write_text("x")
    report = import_data(tmp_path / "mine", tmp_path / "out", **WHOLE)
    wanted = {("a__b.jpg", "the left one"): left, ("a__b.jpg", "the one"): right, ("c.png", "both of them"): right}
    assert same(read(tmp_path / "out"), wanted)
    assert report.counts == {"train": (2, 3, 3)} and report.several == 0


def grey(mask: np.ndarray, mode: str) -> Image.Image:
    """A mask as a picture of a mode, its object no white but the darkest that is not black."""
    if mode == "I;16":
        return Image.fromarray(mask.astype(np.uint16))
    if mode == "P":
        picture = Image.frombytes("P", mask.shape[::-1], mask.astype(np.uint8).tobytes())
        picture.putpalette([0, 0, 0, 0, 0, 128] + [9] * 762)
        return picture
    if mode == "1":
        return Image.fromarray(mask)
    if mode == "RGBA":  # white all over, opaque where the object is
        return Image.fromarray(np.stack([np.full(SIZE, 255)] * 3 + [mask * 255], axis=-1).astype(np.uint8))
    return Image.fromarray(mask.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode(mode: str, tmp_path) -> None:
    folder = draw_pictures(tmp_path, {"a.jpg": SIZE})
    mask = box_mask(SIZE, 3, 4, 5, 6)
    grey(mask, mode).save(folder / "m.png")
    (folder / "data.csv").write_text("image,sentence,mask\na.jpg,the thing,m.png\n")
    import_data(folder / "data.csv", folder / "out", **WHOLE)
    assert same(read(folder / "out"), {("a.jpg", "the thing"): mask})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("box", "[3, 4, 5, 6]"),
        ("polygon", "[3, 4, 8, 4, 8, 10, 3, 10]"),
        ("polygon", "[[3, 4], [8, 4], [8, 10], [3, 10]]"),
        ("polygon", "[[3, 4, 8, 4, 8, 7, 3, 7], [3, 7, 8, 7, 8, 10, 3, 10]]"),
        ("rle", json.dumps({"size": list(SIZE), "counts": own.runs_of(box_mask(SIZE, 3, 4, 5, 6).T.ravel().tolist())})),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_a_table_may_draw(column: str, value: str, delimiter: str, tmp_path) -> None:
    folder = draw_pictures(tmp_path, {"a.jpg": SIZE})
    quoted = '"' + value.replace('"', '""') + '"'
    rows = [["Image", "Sentence", column.upper(), "mask"], ["a.jpg", "the thing", quoted, ""], []]
    text = "\ufeff" + "".join(delimiter.join(row) + "\r\n" for row in rows)  # as spreadsheets save it
    (folder / "data.csv").write_bytes(text.encode())
    import_data(folder / "data.csv", folder / "out", **WHOLE)
    assert same(read(folder / "out"), {("a.jpg", "the thing"): box_mask(SIZE, 3, 4, 5, 6)})


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(end: str, tmp_path) -> None:
    folder = draw_pictures(tmp_path, {"a.jpg": SIZE})
    (folder / "data.csv").write_bytes(f'image,sentence,box{end}a.jpg,the thing,"[3, 4, 5, 6]"{end}'.encode())
    import_data(folder / "data.csv", folder / "out", **WHOLE)
    assert same(read(folder / "out"), {("a.jpg", "the thing"): box_mask(SIZE, 3, 4, 5, 6)})


def test_rows_of_one_object_are_one_ref(tmp_path) -> None:
    folder = draw_pictures(tmp_path, {"a.jpg": SIZE})
    save_mask(box_mask(SIZE, 3, 4, 5, 6), folder / "m.png")
    rows = ["a.jpg,the thing,m.png,", 'a.jpg,that  box,,"[3, 4, 5, 6]"', 'a.jpg,the rest,,"[9, 4, 5, 6]"']
    (folder / "data.csv").write_text("\n".join(["image,sentence,mask,box", *rows]))
    report = import_data(folder / "data.csv", folder / "out", **WHOLE)
    reader = open_reader(folder / "out", "own")
    said = [[sentence.raw for sentence in ref.sentences] for ref in reader.refs("train")]
    assert said == [["the thing", "that box"], ["the rest"]]
    assert report.counts["train"] == (1, 2, 3)


def test_labels_name_all_that_bear_them(tmp_path) -> None:
    folder = draw_pictures(tmp_path, {"a.jpg": SIZE, "b.jpg": SIZE})
    boxes = [(0, (1, 1, 4, 4), 2), (0, (10, 1, 4, 4), 2), (0, (20, 1, 4, 4), 1), (1, (2, 2, 4, 4), 2)]
    images = [{"id": n, "file_name": f"{'ab'[n]}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in range(2)]
    annotations = [
        {"id": n, "image_id": image, "bbox": list(box), "category_id": kind}
        for n, (image, box, kind) in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "wet_dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    report = import_data(folder / "coco.json", folder / "out", **WHOLE)
    masks = [box_mask(SIZE, *box) for _, box, _ in boxes]
    wanted = {("a.jpg", "wet dog"): masks[0] | masks[1], ("a.jpg", "cat"): masks[2], ("b.jpg", "wet dog"): masks[3]}
    assert same(read(folder / "out"), wanted) and report.several == 1
    assert set(open_reader(folder / "out", "own").categories.values()) == {"cat", "wet_dog"}


def test_turned_boxes(tmp_path) -> None:
    """A quarter turn: Label Studio's about the upper left corner, CVAT's about the centre."""
    folder = draw_pictures(tmp_path, {"a.jpg": SIZE})
    value = {"x": 50, "y": 25, "width": 20, "height": 20, "rotation": 90, "rectanglelabels": ["box"]}  # 15, 5, 6, 4
    result = {"id": "r", "type": "rectanglelabels", "original_height": 20, "original_width": 30, "value": value}
    task = {"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": [result]}]}
    (folder / "export.json").write_text(json.dumps([task]))
    shape = '<box label="box" xtl="10" ytl="4" xbr="16" ybr="8" rotation="90"/>'
    image = f'<image name="a.jpg" width="30" height="20">{shape}</image>'
    (folder / "cvat.xml").write_text(f"<annotations>{image}</annotations>")
    for source, box in (("export.json", (11, 5, 4, 6)), ("cvat.xml", (11, 3, 4, 6))):
        import_data(folder / source, folder / source[:4], **WHOLE)
        assert same(read(folder / source[:4]), {("a.jpg", "box"): box_mask(SIZE, *box)})


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/data/upload/12/0a1b2c3d-a%20b.jpg", "a b.jpg"),
        ("/data/upload/12/0a1b2c3d-a.jpg", "0a1b2c3d-a.jpg"),
        ("/data/local-files/?d=photos/red%20ones/a.jpg", "photos/red ones/a.jpg"),
        ("s3://bucket/photos/a.jpg", "photos/a.jpg"),
        ("https://example.org/x/a.jpg?size=full", "a.jpg"),
        ("100%.jpg", "100%.jpg"),
    ],
)
def test_label_studios_addresses(address: str, name: str) -> None:
    assert name in image_names({"image": address, "title": "b.jpg"})
    assert name in image_names({"picture": address, "title": "no name"})


def table_of(folder: Path, names: list[str]) -> Path:
    rows = [f'{name},thing {number},"[{number}, 1, 3, 3]"' for name in names for number in range(3)]
    (folder / "data.csv").write_text("\n".join(["image,sentence,box", *rows]))
    return folder / "data.csv"


def split_of_each(out: Path) -> set[tuple[str, str]]:
    """Pairs of a picture, by its true name, and its split."""
    reader = open_reader(out, "own")
    refs = ((ref, split) for split in reader.splits for ref in reader.refs(split))
    return {(reader.image_path(ref.image_id).resolve().name, split) for ref, split in refs}


def test_splits_are_by_picture(tmp_path) -> None:
    names = [f"{number}.png" for number in range(20)]
    folder = draw_pictures(tmp_path, dict.fromkeys(names, SIZE))
    found = []
    for seed, order in ((1, 1), (1, -1), (2, 1)):
        out = folder / f"out{len(found)}"
        report = import_data(table_of(folder, names[::order]), out, val=0.1, test=0.25, seed=seed)
        assert {split: count[0] for split, count in report.counts.items()} == {"train": 13, "val": 2, "test": 5}
        found.append(split_of_each(out))
        assert len(found[-1]) == len(names)
    assert found[0] == found[1] != found[2]


def test_two_names_of_a_file_are_one_picture(tmp_path) -> None:
    folder = draw_pictures(tmp_path, {"a.png": SIZE, "b.png": SIZE})
    os.symlink(folder / "a.png", folder / "link.png")
    source = table_of(folder, ["a.png", "b.png"])
    with source.open("a") as file:
        file.write('\nlink.png,one more,"[9, 9, 3, 3]"')
    for seed in range(4):
        import_data(source, folder / f"out{seed}", val=0.5, test=0, seed=seed)
        assert len(split_of_each(folder / f"out{seed}")) == 2


def test_pictures_stay_where_they_are(tmp_path) -> None:
    folder = draw_pictures(tmp_path / "photos", {"a.jpg": SIZE, "b.jpg": SIZE})
    source = table_of(folder, ["a.jpg", "b.jpg"])
    out = tmp_path / "out"
    import_data(source, out, val=0.5, test=0)
    assert sorted(path.name for path in out.rglob("*")) == ["instances.json", "own", "refs(unc).json"]
    assert check_data(out, "own").problems == []
    folder.rename(tmp_path / "moved")
    assert "photos" in check_data(out, "own").problems[0]
    assert check_data(out, "own", images=tmp_path / "moved").problems == []


def test_pictures_below_the_root_move_with_it(tmp_path) -> None:
    folder = draw_pictures(tmp_path / "root/photos", {"a.jpg": SIZE})
    import_data(table_of(folder, ["a.jpg"]), tmp_path / "root", **WHOLE)
    (tmp_path / "root").rename(tmp_path / "other")
    assert check_data(tmp_path / "other", "own").problems == []


def test_pictures_in_another_folder(tmp_path) -> None:
    draw_pictures(tmp_path / "photos/images/deep", {"a.jpg": SIZE})
    (tmp_path / "tables").mkdir()
    for name in ("deep\\a.jpg", "images/deep/a.jpg", str(tmp_path / "photos/images/deep/a.jpg")):
        out = tmp_path / f"out{len(name)}"
        import_data(table_of(tmp_path / "tables", [name]), out, images=tmp_path / "photos", **WHOLE)
        assert len(read(out)) == 3
