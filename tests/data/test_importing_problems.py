"""Own data that cannot be used: all of it told at once, with its rows, and nothing written."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from magnet_fast.cli import app
from magnet_fast.data import import_data
from magnet_fast.data.importing import ImportProblemsError, writing

from .own import Object, box_mask, brushed, draw_pictures, read, same, save_mask, write_label_studio

SIZE = (20, 30)
BOX = '"[3, 4, 5, 6]"'
GOOD = box_mask(SIZE, 3, 4, 5, 6)
HEADER = "image,sentence,mask,polygon,box,rle"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_any_size(path: Path, height: int, width: int) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture, and others of which each has a fault."""
    draw_pictures(tmp_path, {"a.jpg": SIZE, "square.jpg": (20, 20)})
    (tmp_path / "text.jpg").write_text("no picture\n")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-400])
    png_of_any_size(tmp_path / "bomb.png", 40_000, 40_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "a.jpg") as picture:
        picture.save(tmp_path / "turned.jpg", exif=exif)
    save_mask(GOOD, tmp_path / "good.png")
    save_mask(GOOD & False, tmp_path / "black.png")
    save_mask(box_mask((20, 20), 3, 4, 5, 6), tmp_path / "square.png")
    Image.fromarray(GOOD.astype(np.uint8) * 255).save(tmp_path / "mask.jpg")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    return tmp_path


def refused(source: Path, **options: object) -> list[str]:
    """The problems of a source, of which nothing is written."""
    out = source.parent / "deep" / "out"
    with pytest.raises(ImportProblemsError) as caught:
        import_data(source, out, val=0, test=0, **options)
    assert not out.parent.exists()
    return caught.value.problems


BAD_ROWS = [
    ("no.jpg,the thing,,,[BOX],", "image is 'no.jpg'; expected"),
    ("text.jpg,the thing,,,[BOX],", "no format that Pillow knows"),
    ("empty.jpg,the thing,,,[BOX],", "is empty (0 bytes)"),
    ("cut.jpg,the thing,,,[BOX],", "cannot be read"),
    ("bomb.png,the thing,,,[BOX],", "pixels; expected at most"),
    ("turned.jpg,the thing,,,[BOX],", "EXIF orientation 6"),
    ("../a.jpg,the thing,,,[BOX],", "expected a path within the data's folders"),
    ("/etc/a.jpg,the thing,,,[BOX],", "expected a path within the data's folders"),
    (",the thing,,,[BOX],", "image is ''"),
    (".,the thing,,,[BOX],", "is a folder"),
    ("a.jpg,,,,[BOX],", "sentence is ''; expected words"),
    ("a.jpg,?!,,,[BOX],", "sentence is '?!'; expected words"),
    ("a.jpg," + "word " * 101 + ",,,[BOX],", "sentence has 504 characters; expected at most 500"),
    ("a.jpg,the good one,good.png,,,", "sentence is 'the good one', which row 2 says of the same object"),
    ("a.jpg,the thing,square.png,,,", "is 20 x 20 pixels (height x width); expected 20 x 30"),
    ("a.jpg,the thing,black.png,,,", "mask is empty"),
    ("a.jpg,the thing,mask.jpg,,,", "is a JPEG"),
    ("a.jpg,the thing,broken.png,,,", "cannot be read"),
    ("a.jpg,the thing,bomb.png,,,", "pixels; expected at most"),
    ("a.jpg,the thing,text.jpg,,,", "no format that Pillow knows"),
    ("a.jpg,the thing,none.png,,,", "does not exist"),
    ("a.jpg,the thing,,,,", "row has nothing drawn; expected one of mask, polygon, box, rle"),
    ("a.jpg,the thing,good.png,,[BOX],", "row has mask and box; expected one of"),
    ('a.jpg,the thing,,"[3, 4, 35, 4, 35, 9]",,', "outline reaches from 3 to 35 in x; expected 0 to 30"),
    ('a.jpg,the thing,,"[3, -5, 9, 4, 9, 9]",,', "outline reaches from -5 to 9 in y; expected 0 to 20"),
    ('a.jpg,the thing,,"[3, 4, 9e9, 4, 35, 9]",,', "more than 3 times that side outside"),
    ('a.jpg,the thing,,"[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]",,', "not shares of the side"),
    ('a.jpg,the thing,,"[3, 4, NaN, 4, 5, 9]",,', "not finite"),
    ('a.jpg,the thing,,"[3, 4, 9, 4]",,', "no polygon of three points"),
    ('a.jpg,the thing,,"[[3, 4, 9, ""x"", 5, 9]]",,', "expected"),
    ("a.jpg,the thing,,3;4;5;9,,", "polygon is '3;4;5;9', no JSON; expected [["),
    ("a.jpg,the thing,," + "[" * 5000 + ",,", "polygon is"),
    ('a.jpg,the thing,,,"[3, 4, 0, 6]",', "box has width 0 and height 6"),
    ('a.jpg,the thing,,,"[3, 4, 1e400, 6]",', "expected x, y, width, height"),
    ('a.jpg,the thing,,,"[3, 4, 5]",', "expected [x, y, width, height]"),
    ('a.jpg,the thing,,,"[25, 4, 20, 6]",', "outline reaches from 25 to 45 in x"),
    ('a.jpg,the thing,,,,"{""size"": [20, 20], ""counts"": [10, 390]}"', "RLE has size [20, 20]"),
    ('a.jpg,the thing,,,,"{""size"": [20, 30], ""counts"": [10, 900]}"', "RLE has a run of 900"),
    ('a.jpg,the thing,,,,"{""size"": [20, 30], ""counts"": [600]}"', "mask is empty"),
    ("a.jpg,the thing, with a comma,,,[BOX],", "row has 7 cells, the header 6"),
]


@pytest.mark.parametrize(("row", "told"), BAD_ROWS, ids=[told for _, told in BAD_ROWS])
def test_a_bad_row(row: str, told: str, folder: Path) -> None:
    source = folder / "data.csv"
    rows = [HEADER, "a.jpg,the good one,good.png,,,", row.replace("[BOX]", BOX), f"square.jpg,the last one,,,{BOX},"]
    source.write_text("\n".join(rows))
    (problem,) = refused(source)
    assert problem.startswith("row 3: ") and told in problem
    report = import_data(source, folder / "out", val=0.5, test=0, skip_bad=True)
    assert report.left_out == [problem]
    found = read(folder / "out")
    assert found.keys() == {("a.jpg", "the good one"), ("square.jpg", "the last one")}
    assert np.array_equal(found["a.jpg", "the good one"], GOOD)


def test_all_is_told_at_once_by_the_command_line(folder: Path) -> None:
    source, out = folder / "data.csv", folder / "new" / "out"
    bad = [row.replace("[BOX]", BOX) for row, _ in BAD_ROWS]
    source.write_text("\n".join([HEADER, "a.jpg,the good one,good.png,,,", *bad, "no.jpg,?,,,,"]))
    result = CliRunner().invoke(app, ["data", "import", str(source), "--out", str(out)])
    assert result.exit_code == 2
    *problems, last = result.output.splitlines()
    assert sum(line.startswith("problem: row ") for line in problems) == len(problems) >= len(bad)
    assert {int(line.split()[2].rstrip(":")) for line in problems} == set(range(3, len(bad) + 4))
    assert last.startswith("error: ") and "--skip-bad" in last and not out.parent.exists()
    skipping = ["data", "import", str(source), "--out", str(out), "--val", "0", "--test", "0", "--skip-bad"]
    result = CliRunner().invoke(app, skipping)
    assert result.exit_code == 0 and "train: 1 images, 1 objects, 1 sentences" in result.output
    assert result.output.count("left out: ") == len(problems)
    assert "--set batch_size=1 --set validate_every=never" in result.output
    assert same(read(out), {("a.jpg", "the good one"): GOOD})
    assert "exists; expected a new folder" in CliRunner().invoke(app, skipping).output


def test_several_faults_of_a_row_are_all_told(folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"image": "no.jpg", "sentence": "?", "box": [3, 4, 5, 6]}\n[]\n{')
    problems = refused(folder / "data.jsonl")
    assert [problem.split(":")[0] for problem in problems] == ["row 2", "row 3", "row 1", "row 1"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"image,words,mask\n", "got 'image,words,mask', without sentence"),
        ("a.csv", b"image,sentence\n", "without one of (mask, polygon, box, rle)"),
        ("a.csv", b"image,sentence,mask,Mask\n", "expected each column once"),
        ("a.csv", b"", "expected a first line with the columns image, sentence, one of (mask, polygon, box, rle)"),
        ("a.csv", b"x" * (1 << 18), "expected a first line"),  # more than Python's reader takes for a field
        ("a.csv", b"image,sentence,mask\na,b," + b"x" * (1 << 25), "row 2: expected plain CSV, got field larger"),
        ("a.csv", b'image,sentence,box\na.jpg,"the thing,x\n', "row 2: expected plain CSV, got unexpected end"),
        ("a.csv", "image,sentence,mask\n".encode("utf-16"), "line 1: expected text in UTF-8"),
        ("a.csv", b"image,sentence,mask\n", "expected at least one object"),
        ("a.json", b'{"images": []}', "expected COCO's dict or Label Studio's list"),
        ("a.json", b'{"annotations": [], "images": null}', "images is null; expected a list"),
        ("a.json", b"{", "not valid JSON"),
        ("a.xml", b"<annotations>", "expected XML"),
        ("a.xml", b"<html/>", "expected the export 'CVAT for images 1.1', got <html>"),
        ("a.xml", b"<annotations><track/></annotations>", "got <track>, of a video"),
        ("a.xml", b'<!DOCTYPE x [<!ENTITY a "aa">]><annotations>&a;</annotations>', "without a document type"),
        ("a.xml", '<!DOCTYPE x [<!ENTITY a "aa">]><annotations/>'.encode("utf-16"), "expected XML in UTF-8"),
        ("a.xml", b'<?xml version="1.0" encoding="cp037"?>' + "<!DOCTYPE x>".encode("cp037"), "expected XML in UTF-8"),
        ("a.txt", b"", "expected a table (.csv, .tsv, .jsonl), "),
    ],
)
def test_a_source_of_another_form(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        import_data(tmp_path / name, tmp_path / "out")
    assert told in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_arguments(folder: Path) -> None:
    (folder / "data.csv").write_text(f"image,sentence,box\na.jpg,the good one,{BOX}\n")
    for options, told in (
        ({"val": 1}, "val is 1; expected a share"),
        ({"test": -0.1}, "test is -0.1"),
        ({"dataset": "a/b"}, "dataset is 'a/b'"),
        ({"images": folder / "none"}, "expected a folder of pictures that exists"),
        ({}, "expected at least one for train"),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            import_data(folder / "data.csv", folder / "out", **options)
        assert told in str(caught.value) and not (folder / "out").exists()
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        import_data(folder / "none.csv", folder / "out")


def test_coco(folder: Path) -> None:
    image = {"id": 1, "file_name": "a.jpg", "height": 20, "width": 30}
    good = {"image_id": 1, "sentence": "the thing", "bbox": [3, 4, 5, 6]}
    content = {
        "images": [image, {**image, "file_name": "b.jpg"}, {**image, "id": 2, "height": 30, "width": 20}, {"id": 3}],
        "annotations": [
            {**good, "id": 1}, {**good, "id": 1}, {**good, "id": 2, "image_id": 9}, {**good, "id": 3, "bbox": None},
            {**good, "id": 4, "sentence": []}, {**good, "id": 5, "image_id": 2}, {**good, "id": 6, "image_id": 3},
            {**good, "id": 7, "sentence": 7}, {**good, "id": "8"},
        ],
    }  # fmt: skip
    (folder / "coco.json").write_text(json.dumps(content))
    problems = refused(folder / "coco.json")
    for place, told in (
        ("image record 1", "id is 1, that of record 0, too"),
        ("image 3", "lacks 'file_name'"),
        ("annotation record 1", "id is 1, that of record 0, too"),
        ("annotation 2", "image_id is 9; expected the id of one"),
        ("annotation 3", "bbox is null"),
        ("annotation 6", "image_id is 3; expected an image without a problem"),
        ("annotation record 8", "has id '8'; expected a whole number, without quotes"),
        ("annotation 4", "sentence is null; expected words"),
        ("annotation 5", "size is 30 x 20 (height x width); expected 20 x 30, that of 'a.jpg'"),
        ("annotation 7", "sentence is 7; expected words"),
    ):
        (problem,) = [one for one in problems if one.startswith(f"{place}: ")]
        assert told in problem
    assert len(problems) == 10


def test_label_studio(folder: Path) -> None:
    def task(number: int, *results: dict, **more: object) -> dict:
        return {"id": number, "data": {"image": "a.jpg"}, "annotations": [{"result": list(results)}], **more}

    def brush(rle: list, **more: object) -> dict:
        size = {"original_width": 30, "original_height": 20}
        value = {"format": "rle", "rle": rle, "brushlabels": ["thing"]}
        return {"id": "r", "type": "brushlabels", "value": value, **size, **more}

    whole = brushed(GOOD)
    ellipse = {"id": "e", "type": "ellipselabels", "value": {"x": 1}}
    tasks = [
        task(1, brush(whole)), task(2, brush(whole[:-20])), task(3, brush(brushed(GOOD[:-1]))),
        task(4, brush([1, 256])), task(5, brush(whole, image_rotation=90)), task(6, ellipse),
        task(7, brush(whole, original_width=31)),
        task(8, annotations=[{"result": []}, {"result": []}]), {"image": "a.jpg", "label": []},
        task(10, brush(whole), data={"title": "x"}), task(11, brush([*whole[:7], 255, 255, 255])),
        task(13, brush(whole, original_width=[30], original_height=[20])),
        task(12, {"id": "t", "type": "textarea", "value": {"text": ["the whole"]}}),
    ]  # fmt: skip
    (folder / "export.json").write_text(json.dumps(tasks))
    problems = refused(folder / "export.json")
    for place, told in (
        ("task 2, region 'r'", "too few for its values"),
        ("task 3, region 'r'", "rle has 2280 values of 8 bits; expected 2400"),
        ("task 4, region 'r'", "rle is [1, 256]"),
        ("task 5, region 'r'", "image_rotation is 90"),
        ("task 6, region 'e'", "region is ellipselabels"),
        ("task 7, region 'r'", "size is 20 x 31"),
        ("task 8", "annotations has 2 that may be meant"),
        ("task (8)", "as the export 'JSON' has them"),
        ("task 10", "expected one entry with the address of a picture"),
        ("task 11, region 'r'", "rle has"),
        ("task 12, region 't'", "region is textarea"),
        ("task 13, region 'r'", "[20]"),
    ):
        (problem,) = [one for one in problems if one.startswith(f"{place}: ")]
        assert told in problem
    assert len(problems) == 12


def test_of_several_annotations_the_true_one_is_read(folder: Path) -> None:
    source = write_label_studio(folder, [Object("a.jpg", GOOD, "the thing")])
    tasks = json.loads(source.read_text())
    tasks[0]["annotations"][0]["ground_truth"] = True
    tasks[0]["annotations"] += [{"result": []}, {"was_cancelled": True}]
    source.write_text(json.dumps(tasks))
    import_data(source, folder / "out", val=0, test=0)
    assert same(read(folder / "out"), {("a.jpg", "the thing"): GOOD})


def test_cvat(folder: Path) -> None:
    box = 'left="3" top="4" width="5" height="2"'
    shapes = [
        f'<mask label="a" rle="0, 10" {box}/>', f'<mask label="b" rle="0, 11" {box}/>',
        f'<mask label="c" rle="{"1," * 11}" {box}/>', f'<mask label="d" rle="x" {box}/>',
        '<mask label="e" rle="0,10" left="29" top="4" width="5" height="2"/>',
        f'<mask label="f" rle="0,99999999999999999999" {box}/>', '<mask label="g" rle="0,10" left="1"/>',
        '<polyline label="h" points="1,1;2,2"/>', '<polygon label="i" points="1,1;2"/>', "<tag/>",
        '<polygon label="j" points="1,1;2,inf;3,3"/>', '<box label="k" xtl="9" ytl="9" xbr="3" ybr="12"/>',
    ]  # fmt: skip
    images = [
        f'<image name="a.jpg" width="30" height="20">{"".join(shapes)}</image>',
        '<image name="b.jpg" width="many" height="20"/>',
    ]
    (folder / "cvat.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    problems = refused(folder / "cvat.xml")
    told = [
        "rle has runs of 11 pixels; expected 10", "rle has 12 runs; expected at most 11", "rle is 'x'",
        "expected one within 30 x 20", "rle is '0,9999", "expected whole numbers", "shape is a polyline",
        "expected x,y;x,y;...", "points is 'inf'", "box has width -6",
    ]  # fmt: skip
    assert any(one.startswith("image 'b.jpg': it has width 'many'") for one in problems)
    for number, text in enumerate(told, start=2):
        (problem,) = [one for one in problems if one.startswith(f"image 'a.jpg', shape {number}: ")]
        assert text in problem
    assert len(problems) == len(told) + 1


def test_folders(folder: Path) -> None:
    draw_pictures(folder / "mine/images", {"a.jpg": SIZE, "b.jpg": SIZE, "b.png": SIZE})
    for name in ("a__good", "a", "none__the_cat", "b__the_cat", "b_the_cat"):
        save_mask(GOOD, folder / f"mine/masks/{name}.png")
    problems = refused(folder / "mine")
    assert [problem.split(":")[0] for problem in problems] == [
        f"mask {name}.png" for name in ("a", "b__the_cat", "b_the_cat", "none__the_cat")
    ]
    assert "a__the_words.png" in problems[0] and "b.jpg or b.png" in problems[1] and "'none'" in problems[3]
    with pytest.raises(ValueError, match="expected the folders images and masks, got a"):
        import_data(folder / "mine/images", folder / "out", images=folder)


@pytest.mark.parametrize("at", ["checking", "first file", "second file", "renaming"])
def test_a_stop_leaves_nothing(at: str, folder: Path, monkeypatch) -> None:
    (folder / "data.csv").write_text(f"image,sentence,box\na.jpg,the good one,{BOX}\n")
    calls = []

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def dump(content: object, file, **_: object) -> None:
        calls.append(content)
        file.write("half")
        if len(calls) == ("first file", "second file").index(at) + 1:
            raise KeyboardInterrupt

    if at == "renaming":
        monkeypatch.setattr(writing.os, "replace", stop)
    elif at != "checking":
        monkeypatch.setattr(writing.json, "dump", dump)
    before = sorted(folder.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        progress = stop if at == "checking" else None
        import_data(folder / "data.csv", folder / "new/out", val=0, test=0, progress=progress)
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_is_told_with_the_file(folder: Path, monkeypatch) -> None:
    (folder / "data.csv").write_text(f"image,sentence,box\na.jpg,the good one,{BOX}\n")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.json, "dump", full)
    with pytest.raises(OSError, match="No space left on device: '.*own/instances.json'"):
        import_data(folder / "data.csv", folder / "out", val=0, test=0)
    assert not (folder / "out").exists()


def test_a_folder_without_a_mask_says_how_one_is_named(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"got none; in a folder: images/PICTURE\.jpg and, .* masks/PICTURE__the"):
        import_data(tmp_path / "mine", tmp_path / "out")
