"""A batch's folder: each format read back, resumed, interrupted, and what is refused."""

from __future__ import annotations

import csv
import fcntl
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

from magnet_fast import Segmenter
from magnet_fast.atomic import write_atomically
from magnet_fast.batch import Results, Row, read_rows, run, segment_rows
from magnet_fast.cli import app
from magnet_fast.inference import Prepared

ASKED = [
    ("a.png", "the red circle"),
    ("b.jpg", "the star"),
    ("a.png", "the moon"),
    ("c.png", "the box"),
    ("a.png", "the star"),
]


@pytest.fixture
def table(pictures: Path) -> Path:
    path = pictures / "rows.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("image", "sentence"), *ASKED])
    return path


@pytest.fixture
def run_command(checkpoint: Path, tmp_path: Path):
    def called(source: Path, *more: object, status: int = 0, out: str = "out") -> str:
        arguments = ["--input", source, "--out", tmp_path / out, "--checkpoint", checkpoint, "--device", "cpu", *more]
        result = CliRunner().invoke(app, ["segment", *map(str, arguments)])
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    return called


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def failures(folder: Path) -> list[list[str]]:
    with open(folder / "errors.csv", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("format", ["png", "rle", "jsonl", "coco"])
def test_each_format_read_back(format: str, segmenter: Segmenter, table: Path, run_command, tmp_path: Path) -> None:
    said = run_command(table, "--format", format, "--batch-size", 3, "--workers", 2)
    assert said == f"{tmp_path / 'out'}: 5 of 5 rows\n"
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl", *{"png": ["masks"], "coco": ["results.json"]}.get(format, [])
    }  # fmt: skip
    found = sorted(lines(out), key=lambda line: line["row"])
    assert [(line["row"], line["image"], line["sentence"]) for line in found] == [
        (number, *row) for number, row in enumerate(ASKED, start=1)
    ]
    for line in found:
        expected = segmenter(table.parent / line["image"], line["sentence"])
        if format == "png":
            mask = np.asarray(Image.open(out / line["mask"]))
            assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
        else:
            runs = line if format == "rle" else line["segmentation"]
            assert isinstance(runs["counts"], str)
            mask = coco_mask.decode(runs)
        mask = mask.astype(bool)
        assert mask.shape == expected.mask.shape  # the picture's own size
        assert np.mean(mask != expected.mask) < 0.01  # borders: sums of another batch's order
        assert mask.any() and not mask.all()
        if format != "rle":
            assert line["area"] == pytest.approx(mask.mean(), abs=1e-6)
            assert line["score"] == pytest.approx(expected.probability[expected.mask].mean(), abs=1e-3)
            assert line["presence"] == pytest.approx(expected.presence, abs=1e-5)
            x, y, width, height = line["box"]
            rows, columns = np.nonzero(mask)
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize("with_ids", [False, True])
def test_coco_reads_the_results(with_ids: bool, pictures: Path, run_command, tmp_path: Path) -> None:
    ids = {"a.png": 391895, "b.jpg": 5, "c.png": 77} if with_ids else {"a.png": 1, "b.jpg": 2, "c.png": 3}
    records = [{"image": image, "sentence": sentence} for image, sentence in ASKED]
    if with_ids:
        records = [record | {"image_id": ids[record["image"]]} for record in records]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_command(pictures / "rows.jsonl", "--format", "coco")
    truth = COCO()
    truth.dataset = {
        "images": [{"id": ids[path.name], "height": h, "width": w} for path in pictures.glob("?.*")
                   for w, h in [Image.open(path).size]],
        "categories": [{"id": 1, "name": "referent"}],
        "annotations": [],
    }  # fmt: skip
    truth.createIndex()
    loaded = truth.loadRes(str(tmp_path / "out" / "results.json"))
    assert [one["image_id"] for one in loaded.loadAnns(loaded.getAnnIds())] == [ids[image] for image, _ in ASKED]
    for one, line in zip(
        loaded.dataset["annotations"], sorted(lines(tmp_path / "out"), key=lambda x: x["row"]), strict=True
    ):
        assert 0 < one["score"] <= 1 and one["category_id"] == 1
        assert np.array_equal(loaded.annToMask(one), coco_mask.decode(line["segmentation"]))


def test_bad_rows_are_listed_and_the_others_done(pictures: Path, run_command, tmp_path: Path, monkeypatch) -> None:
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "half.png").write_bytes((pictures / "c.png").read_bytes()[:900])
    with open(pictures / "large.jpg", "wb") as file:  # 300 MB that no disk has to hold
        file.truncate(300 << 20)
    Image.new("RGB", (400, 300)).save(pictures / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # an error from twice that
    rows = [
        ("a.png", "the red circle", ""),
        ("none.png", "the star", "does not exist"),
        ("text.jpg", "the star", "no format that Pillow knows"),
        ("half.png", "the star", "is the file whole?"),
        ("large.jpg", "the star", "no format that Pillow knows"),
        ("bomb.png", "the star", "has 120000 pixels; expected at most 100000"),
        (".", "the star", "is a folder"),
        ("a.png", "", "sentence: expected text, got an empty one"),
        ("a.png", "\u200b", "leaves no word to read"),
        ("none.png", "the moon", "does not exist"),
        ("a.png", "the moon", ""),
        ("x" * 300 + ".png", "the moon", ""),
    ]
    with open(pictures / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "sentence"), *(row[:2] for row in rows)])
    said = run_command(pictures / "rows.csv", status=1)
    out = tmp_path / "out"
    assert {line["row"] for line in lines(out)} == {1, 11}
    assert [int(row[0]) for row in failures(out)] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    for number, image, sentence, error in failures(out):
        assert (image, sentence) == rows[int(number) - 1][:2] and rows[int(number) - 1][2] in error
        assert f"problem: row {number}, {image}: " in said
    assert f"2 of 12 rows\n10 failed, listed in {out / 'errors.csv'}" in said

    for name in ("none.png", "half.png", "text.jpg"):
        Image.new("RGB", (9, 9)).save(pictures / name)
    said = run_command(pictures / "rows.csv", "--resume", status=1)
    assert {line["row"] for line in lines(out)} == {1, 2, 3, 4, 10, 11} and len(lines(out)) == 6
    assert [int(row[0]) for row in failures(out)] == [5, 6, 7, 8, 9, 12] and "6 of 12 rows, 2 of them before" in said


def test_ctrl_c_loses_nothing_and_resume_does_the_rest(
    table: Path, run_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command(table, out="whole")
    out, add = tmp_path / "out", Results.add

    def interrupted(results: Results, row: Row, found) -> None:
        if len(results.done) == 2:
            raise KeyboardInterrupt
        add(results, row, found)

    monkeypatch.setattr(Results, "add", interrupted)
    said = run_command(table, "--batch-size", 2, status=130)
    assert said == "stopped: 2 of 5 rows are done; the same command with --resume goes on\n"
    monkeypatch.undo()
    assert len(lines(out)) == 2
    done = {line["mask"]: (out / line["mask"]).stat().st_mtime_ns for line in lines(out)}
    with open(out / "results.jsonl", "ab") as file:
        file.write(b'{"row": 4, "image": "c.p')  # by a kill
    run_command(table, "--resume")
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done  # not done again

    def sorted_lines(folder: Path) -> list[dict]:
        return sorted(lines(folder), key=lambda line: line["row"])

    for one, other in zip(sorted_lines(out), sorted_lines(tmp_path / "whole"), strict=True):
        assert (one["row"], one["mask"]) == (other["row"], other["mask"])
        assert np.mean(np.asarray(Image.open(out / one["mask"])) != np.asarray(Image.open(out / other["mask"]))) < 0.01
    assert not list(out.rglob("*.tmp"))


def test_nothing_is_half_written_where_the_disk_is_full(table: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    rows = read_rows(table)

    class Full:
        """A file that takes 40 bytes of the third line."""

        def __init__(self, file) -> None:
            self.file, self.left = file, 3

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data if self.left else data[:40])

    with Results(tmp_path / "out", rows, "jsonl") as results:
        results._file = Full(results._file)
        with pytest.raises(OSError, match="No space left on device: '.*results.jsonl'"):
            segment_rows(segmenter, rows, results)
    assert len(lines(tmp_path / "out")) == 2
    with Results(tmp_path / "out", rows, "jsonl", resume=True) as results:
        assert len(results.done) == 2 and segment_rows(segmenter, rows, results) == []
    assert len(lines(tmp_path / "out")) == 5


def test_a_mask_that_is_gone_is_made_again_and_broken_lines_are(table: Path, run_command, tmp_path: Path) -> None:
    run_command(table)
    out = tmp_path / "out"
    (out / "masks" / "000002-b.png").unlink()
    others = (out / "results.jsonl").read_text().splitlines()[1:]
    (out / "results.jsonl").write_text("\n".join(["\0" * 9, '{"row": []}', "[" * 100_000, *others, others[0]]) + "\n")
    said = run_command(table, "--resume")
    assert "3 broken lines are taken off, and their rows done again" in said and "5 of 5 rows, 3 of them before" in said
    assert (out / "masks" / "000002-b.png").exists()
    assert sorted(line["row"] for line in lines(out)) == [1, 2, 3, 4, 5]


def test_results_are_not_written_over(table: Path, pictures: Path, run_command, tmp_path: Path) -> None:
    run_command(table, "--format", "jsonl")
    out, rows = tmp_path / "out", read_rows(table)
    before = (out / "results.jsonl").read_bytes()

    def refused(message: str, folder: Path, rows: list[Row], format: str = "jsonl", resume: bool = True) -> None:
        with pytest.raises(ValueError, match=message):
            Results(folder, rows, format, resume)

    said = run_command(table, "--format", "jsonl", status=2)
    assert said == f"error: out: {out} already holds results; --resume goes on with them\n"
    for format in ("png", "rle", "coco"):
        refused("out: line 1 of .* is of another input or format", out, rows, format)
    refused("out: line 1 of .* is of another input", out, [row._replace(sentence="the sun") for row in rows])
    refused("out: line 1 of .* is of another input", out, read_rows(pictures, "the star"))
    assert (out / "results.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    refused("out: expected a folder, got the file", tmp_path / "file", rows, resume=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "errors.csv").write_text("mine")
    for resume in (False, True):
        refused("holds errors.csv, but no results.jsonl that it belongs to", tmp_path / "mine", rows, resume=resume)
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "errors.csv").read_text() == "mine"
    with Results(tmp_path / "new", rows, "rle"):
        refused("is written to by another process", tmp_path / "new", rows, "rle")
    refused("format: expected one of png, rle, jsonl, coco, got 'tiff'", tmp_path / "newer", rows, "tiff")
    assert not (tmp_path / "newer").exists()


def test_lines_go_to_the_file_that_stays(table: Path, segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    """Another process that resumes takes half a line off, by a new file in its place, just before this one locks it."""
    rows, out, lock = read_rows(table), tmp_path / "out", fcntl.flock
    with Results(out, rows, "rle") as results:
        segment_rows(segmenter, rows[:2], results)

    def late(file, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        write_atomically(out / "results.jsonl", lambda new: new.write((out / "results.jsonl").read_bytes()))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Results(out, rows, "rle", resume=True) as results:
        segment_rows(segmenter, rows, results)
    assert sorted(line["row"] for line in lines(out)) == [1, 2, 3, 4, 5]


def test_options_that_do_not_go_together(table: Path, checkpoint: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([], "expected IMAGE and EXPRESSION, or --input"),
        (["a.png"], "expected IMAGE and EXPRESSION, or --input"),
        (["a.png", "the", "red", "circle"], "EXPRESSION is 'the', and more follows: 'red circle'; expected one"),
        (["the circle", table], f"EXPRESSION is {str(table)!r}, which is one; expected the picture first, then the"),
        ([table.parent, "circle"], "a folder; expected a picture's file; for all in it: magnet-fast segment --input"),
        (["--input", tmp_path / "none"], "none does not exist"),
        (["a.png", "circle", "--input", table], "EXPRESSION: expected without --input only"),
        (["--input", table, "--overlay", "o.png"], "--overlay: expected without --input only"),
        (["a.png", "circle", "--resume"], "--resume: expected with --input only"),
        (["a.png", "circle", "--workers", 2], "--workers: expected with --input only"),
        (["--input", table, "--expression", "circle"], "has a sentence in each row"),
        (["--input", tmp_path / "none.csv"], "none.csv does not exist"),
    ):
        result = CliRunner().invoke(app, ["segment", *map(str, arguments), "--checkpoint", str(checkpoint)])
        assert result.exit_code == 2 and result.output.startswith("error: ") and message in result.output


def test_a_folder_that_holds_its_own_results(pictures: Path, run_command, tmp_path: Path) -> None:
    said = run_command(pictures, "--expression", "the star", out="pictures")
    assert "3 of 3 rows" in said
    assert "3 of 3 rows, 3 of them before" in run_command(
        pictures, "--expression", "the star", "--resume", out="pictures"
    )


@given(
    rows=st.lists(st.integers(1, 9), max_size=8),
    sides=st.lists(st.integers(1, 60), min_size=8, max_size=8),
    batch_size=st.integers(1, 6),
)
def test_batches_keep_pictures_whole_where_they_fit(rows: list[int], sides: list[int], batch_size: int) -> None:
    pictures = [Prepared(None, (side, side)) for side in sides]
    asked = [(list(range(count)), picture) for count, picture in zip(rows, pictures, strict=False)]
    limit, run._PIXELS_AT_ONCE = run._PIXELS_AT_ONCE, 2000
    try:
        batches = list(run._batches(iter(asked), batch_size))
    finally:
        run._PIXELS_AT_ONCE = limit
    assert [one for batch in batches for one in batch] == [(row, picture) for own, picture in asked for row in own]

    def fits(batch: list) -> bool:
        pixels = sum(picture.size[0] * picture.size[1] for _, picture in batch)
        return len(batch) <= batch_size and pixels <= 2000

    assert all(len(batch) == 1 or fits(batch) for batch in batches)
    for own, picture in asked:
        parts = [batch for batch in batches if any(one is picture for _, one in batch)]
        assert len(parts) == 1 or not fits([(row, picture) for row in own])
    whole = {id(picture) for own, picture in asked if fits([(row, picture) for row in own])}
    for one, other in zip(batches, batches[1:], strict=False):
        following = [pair for pair in other if pair[1] is other[0][1]]
        if id(one[-1][1]) in whole and id(other[0][1]) in whole:  # it could not have taken in the next picture
            assert not fits([*one, *following])
