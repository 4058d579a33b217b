"""Tables and folders: what is read, and what is refused, as a whole or row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from magnet_fast.batch import read_rows


def table(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_of_a_spreadsheet(tmp_path: Path) -> None:
    """With a byte order mark, other columns, another order, quotes, line ends of Windows and a blank line."""
    text = '\ufeffimage_id, sentence ,note,image\r\n0042,"a ""big"", red\ncar",x,a.jpg\r\n\r\nx7,the dog,,/b c.jpg\r\n'
    first, second = read_rows(table(tmp_path, text))
    assert first[:3] == (1, "a.jpg", 'a "big", red\ncar') and first.path == tmp_path / "a.jpg"
    assert (first.image_id, first.problem, second.image_id, second.path) == (42, "", "x7", Path("/b c.jpg"))


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_what_spreadsheets_put_between(between: str, tmp_path: Path) -> None:
    """With capitals in the header, quoted line ends there and in a cell, and the other two in a sentence."""
    rows = [["IMAGE", '"no\ntes"', "Sentence"], ["a.jpg", "", f'"one,\ttwo;\nthree{between}four"'], ["", " ", ""]]
    text = "\r\n".join(between.join(row) for row in rows)
    (row,) = read_rows(table(tmp_path, text, "rows.tsv" if between == "\t" else "rows.csv"))
    assert row[:3] == (1, "a.jpg", f"one,\ttwo;\nthree{between}four") and not row.problem


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"image": "a.jpg", "sentence": "x\\u2028y", "problem": "none"}',
        "",
        '{"image": "b.jpg", "sentence": "y"}',
    ]
    rows = read_rows(table(tmp_path, "\n".join(lines), "rows.JSONL"))
    assert [(row.number, row.image, row.sentence, row.image_id) for row in rows] == [
        (1, "a.jpg", "x\u2028y", 1),
        (2, "b.jpg", "y", 2),
    ]
    assert not any(row.problem for row in rows)


def test_pictures_are_numbered_as_they_come_where_no_id_is_given(tmp_path: Path) -> None:
    rows = read_rows(table(tmp_path, "image,sentence\na,x\nb,x\na,y\nc,x\n"))
    assert [row.image_id for row in rows] == [1, 2, 1, 3]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"image": "a.jpg"}', "sentence: expected text, got null"),
        ('{"image": "a.jpg", "sentence": "  "}', "sentence: expected text, got an empty one"),
        ('{"image": 3, "sentence": "x"}', "image: expected text, got 3"),
        ('{"image": "", "sentence": "x"}', "image: expected text, got an empty one"),
        ('["a.jpg", "x"]', "expected a JSON object, got ['a.jpg', 'x']"),
        ('{"image": "a.jpg", "sent', "expected a line of JSON, got "),
        ("[" * 100_000, "expected a line of JSON, got "),
        ('{"image": "a.jpg", "Image": "b.jpg", "sentence": "x"}', "expected image once, got ['image', 'Image', 'sent"),
        ('{"image": "a.jpg", "sentence": "x"}', "image_id: expected a number or a text, as in other rows, got null"),
        ('{"image": "a.jpg", "sentence": "x", "image_id": true}', "image_id: expected a number or a text"),
    ],
)
def test_a_bad_line_leaves_the_others(tmp_path: Path, line: str, problem: str) -> None:
    good = json.dumps({"image": "b.jpg", "sentence": "y", "image_id": 7})
    rows = read_rows(table(tmp_path, f"{good}\n{line}\n{good}\n", "rows.jsonl"))
    assert [bool(row.problem) for row in rows] == [False, True, False]
    assert rows[1].problem.startswith(problem) and rows[1].number == 2


def test_an_id_is_of_one_picture(tmp_path: Path) -> None:
    rows = read_rows(table(tmp_path, "image,sentence,image_id\na,x,5\nb,x,5\na,y,5\nb,y,6\n"))
    assert [row.problem for row in rows] == ["", "image_id: expected another than 5, which is that of a", "", ""]
    assert [row.image_id for row in rows] == [5, 2, 5, 6]


def test_a_comma_without_quotes_is_a_bad_row(tmp_path: Path) -> None:
    rows = read_rows(table(tmp_path, "image,sentence\na.jpg,the big, red car\nb.jpg\nc.jpg,x\n"))
    assert (
        rows[0].problem
        == "row has 3 cells, the header 2; expected as many: put a cell that holds ',' into double quotes"
    )
    assert rows[1].problem.startswith("row has 1 cells") and not rows[2].problem
    assert [row.image for row in rows] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.csv",
            "image|sentence\na|x\n",
            r"columns image, sentence, .*, got 'image\|sentence', without image, sent",
        ),
        ("rows.csv", "file;sentence\na;x\n", "got 'file;sentence', without image$"),
        ("rows.csv", "image,sentence,image\na,x,b\n", "expected each column once, got 'image' twice"),
        ("rows.csv", "image,sentence,x;image;sentence\n", "one way, got .*, with commas or semicolons"),
        ("rows.csv", "", "expected a first line"),
        ("rows.csv", "image,sentence\n", "there is no row or picture in it"),
        ("rows.jsonl", "\n", "there is no row or picture in it"),
        ("rows.csv", 'image,sentence\na,"x\nb,y\n', "row 2: expected plain CSV, got unexpected end of data"),
        ("rows.csv", "image,sentence\na,x\n".encode("utf-16"), "line 1: expected text in UTF-8"),
        ("rows.tsv", b"image\tsentence\r\na\tx\rb\tna\xefve\n", "rows.tsv: line 3: expected text in UTF-8"),
        ("rows.jsonl", b'\n{"image": "\xff"}', "line 2: expected text in UTF-8"),
        ("rows.txt", "image,sentence\n", "input: expected a folder or a table, .csv, .tsv, .jsonl, got"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(table(tmp_path, text, name))


def test_a_folder_and_those_below(pictures: Path) -> None:
    (pictures / "deep" / ".hidden").mkdir(parents=True)
    (pictures / "masks").mkdir()
    (pictures / "out/masks").mkdir(parents=True)
    made = ("masks/1.png", "results.jsonl", "out/masks/a.png", "out/results.jsonl")  # by earlier batches
    for name in ("deep/z.JPEG", "deep/.hidden/x.png", "._a.png", "notes.txt", "paper.pdf", *made):
        (pictures / name).write_bytes(b"")
    rows = read_rows(pictures, "the red car")
    assert [(row.number, row.image) for row in rows] == [(1, "a.png"), (2, "b.jpg"), (3, "c.png"), (4, "deep/z.JPEG")]
    assert {row.sentence for row in rows} == {"the red car"} and rows[3].path == pictures / "deep" / "z.JPEG"
    (pictures / "results.jsonl").unlink()  # the masks may be anybody's pictures
    assert "masks/1.png" in [row.image for row in read_rows(pictures, "the red car")]


def test_what_goes_with_what(tmp_path: Path, pictures: Path) -> None:
    for expression in (None, " "):
        with pytest.raises(ValueError, match="expression: expected a sentence for all pictures of the folder"):
            read_rows(pictures, expression)
    with pytest.raises(ValueError, match="has a sentence in each row"):
        read_rows(table(tmp_path, "image,sentence\na,x\n"), "the car")
    with pytest.raises(FileNotFoundError, match="input none.csv does not exist"):
        read_rows(Path("none.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no row or picture in it"):
        read_rows(tmp_path / "empty", "the car")
