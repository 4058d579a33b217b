"""A complete folder passes; every kind of gap is named with what helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from magnet_fast.cli import app
from magnet_fast.data import check
from magnet_fast.data.check import check_data

from .layout import small_instances, small_ref, small_refs, write_root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(check.PUBLISHED_REFS, ("refcoco", "unc"), {"train": 2, "val": 1})
    return write_root(tmp_path)


def only_problem(root: Path, **settings: object) -> str:
    problems = check_data(root, **settings).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_complete(root: Path) -> None:
    seen = []
    report = check_data(root, progress=lambda done, total: seen.append((done, total)))
    assert report.problems == [] and report.where.endswith("refs(unc).p")
    assert report.counts == {"train": (2, 3, 1), "val": (1, 2, 1)}
    assert seen == [(1, 2), (2, 2)]


def test_embedded_scenes_are_complete(easy_root: Path) -> None:
    report = check_data(easy_root)
    assert report.problems == [] and sum(sentences for _, sentences, _ in report.counts.values()) > 100


def test_counts_are_compared_with_the_published(tmp_path: Path) -> None:
    problems = check_data(write_root(tmp_path)).problems
    assert len(problems) == 4  # RefCOCO's four splits
    assert "split train has 2 refs, published are 42404" in problems[0]
    assert "split testB has 0 refs, published are 1810" in problems[3]
    assert "web.archive.org" in problems[3]


def test_nothing_is_known_of_other_data(tmp_path: Path) -> None:
    assert check_data(write_root(tmp_path, dataset="mine"), "mine").problems == []


def test_absent_files(root: Path, tmp_path: Path) -> None:
    assert "does not exist" in only_problem(tmp_path / "nowhere")
    message = only_problem(root, dataset="refcocog", split_by="umd")
    assert "refcocog does not exist" in message and "refcocog.zip" in message
    (root / "refcoco" / "refs(unc).p").unlink()
    assert "holds none of refs(unc).p" in only_problem(root)


def test_no_image_folder(root: Path) -> None:
    (root / "images/mscoco/images/train2014").rename(root / "elsewhere")
    message = only_problem(root)
    assert "no image folder" in message and "train2014.zip" in message


def test_a_picture_whose_download_broke_off(root: Path) -> None:
    """Its header is whole; so is a picture with something behind its end."""
    folder = root / "images/mscoco/images/train2014"
    whole = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole + 2000 * b"x")
    assert check_data(root).problems == []
    (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert re.match(r"1 image unreadable: image .*a\.jpg cannot be read: .*is the file whole\?", only_problem(root))


def test_images_absent_damaged_and_of_another_size(root: Path) -> None:
    folder = root / "images/mscoco/images/train2014"
    (folder / "b.jpg").unlink()
    message = only_problem(root)
    assert message.startswith("1 image absent: image b.jpg (image_id 8)") and "train2014.zip" in message
    (folder / "b.jpg").write_bytes(b"")
    assert only_problem(root).startswith("1 image unreadable: ")
    Image.new("RGB", (20, 30)).save(folder / "b.jpg")
    assert "b.jpg is 30x20, instances.json says 20x30 (height x width)" in only_problem(root)
    (folder / "a.jpg").unlink()
    assert len(check_data(root).problems) == 2


def test_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.PUBLISHED_REFS, ("refcoco", "unc"), {"train": 2, "val": 1})
    instances = small_instances()
    instances["annotations"][1]["segmentation"] = [[60, 60, 65, 60, 65, 65, 60, 65]]  # outside the image
    root = write_root(tmp_path, instances=instances)
    assert "1 mask unusable: ref_id 2: its annotation covers no pixel" in only_problem(root)
    assert check_data(root, masks=False).problems == []


def test_long_lists_are_cut(tmp_path: Path) -> None:
    instances = small_instances()
    instances["images"] += [{"id": 100 + i, "file_name": f"{i}.jpg", "height": 20, "width": 30} for i in range(25)]
    polygon = [[2, 3, 10, 3, 10, 9, 2, 9]]
    instances["annotations"] += [
        {"id": 200 + i, "image_id": 100 + i, "category_id": 1, "segmentation": polygon} for i in range(25)
    ]
    refs = [*small_refs(), *(small_ref(50 + i, 200 + i, 100 + i, "thing") for i in range(25))]
    root = write_root(tmp_path, instances=instances, refs=refs, dataset="mine")
    message = only_problem(root, dataset="mine")
    assert message.startswith("25 images absent: image 0.jpg") and "image 19.jpg" in message
    assert "image 20.jpg" not in message and "; and 5 more" in message


def test_command(root: Path) -> None:
    arguments = ["data", "check", "--data", str(root)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "train: 2 refs, 3 sentences, 1 images" in done.output
    assert "refs(unc).p: complete" in done.output
    (root / "images/mscoco/images/train2014/b.jpg").unlink()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "problem: 1 image absent" in done.output
