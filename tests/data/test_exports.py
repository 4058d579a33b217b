"""Exports that other programs' own writers made (exports/README.md) are read to what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magnet_fast.data import import_data

from .own import Masks, box_mask, read, same

EXPORTS = Path(__file__).parent / "exports"
SIZE = 30, 40
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
DISC = (ROWS - 12) ** 2 + (COLUMNS - 25) ** 2 <= 8.2**2
ELL = box_mask(SIZE, 3, 4, 12, 6) | box_mask(SIZE, 3, 4, 6, 18)
BOX = box_mask(SIZE, 20, 5, 12, 9)
WHOLE = box_mask(SIZE, 0, 0, 40, 30)


def leaning() -> np.ndarray:
    """14 x 6 around (20, 16), turned clockwise by 30 degrees: pixels whose centres are inside."""
    x, y = COLUMNS + 0.5 - 20, ROWS + 0.5 - 16
    along = x * np.cos(np.pi / 6) + y * np.sin(np.pi / 6)
    across = y * np.cos(np.pi / 6) - x * np.sin(np.pi / 6)
    return (abs(along) <= 7) & (abs(across) <= 3)


def imported(tmp_path: Path, name: str) -> Masks:
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True, exist_ok=True)
    for one in ("a b.jpg", "deep/c.jpg"):
        Image.new("RGB", SIZE[::-1]).save(pictures / one)
    import_data(EXPORTS / name, tmp_path / "out", images=pictures, val=0, test=0)
    return read(tmp_path / "out")


def test_cvat_by_datumaro(tmp_path: Path) -> None:
    found = imported(tmp_path, "datumaro_cvat.xml")
    turned = found.pop(("a b.jpg", "the leaning dog"))
    wanted = {
        ("a b.jpg", "the black cat"): ELL,
        ("a b.jpg", "the small dog"): BOX,
        ("a b.jpg", "the round cat"): DISC,
        ("c.jpg", "the dog over all of it"): WHOLE,
    }
    assert same(found, wanted)
    assert (turned & leaning()).sum() / (turned | leaning()).sum() > 0.85  # slanting borders are a matter of rule


def test_coco_by_datumaro(tmp_path: Path) -> None:
    """Sentences stand among the annotation's `attributes`, as CVAT writes them, too."""
    wanted = {
        ("a b.jpg", "the black cat"): ELL,
        ("a b.jpg", "the small dog"): BOX,
        ("a b.jpg", "the round cat"): DISC,
        ("c.jpg", "the dog over all of it"): WHOLE,
    }
    assert same(imported(tmp_path, "datumaro_coco.json"), wanted)


def test_label_studio(tmp_path: Path) -> None:
    wanted = {
        ("a b.jpg", "the black cat"): ELL,
        ("a b.jpg", "the cat at the left"): ELL,
        ("a b.jpg", "the box of a cat"): box_mask(SIZE, 3, 4, 12, 18),
        ("a b.jpg", "a dog"): BOX,
        ("a b.jpg", "a dog turned"): box_mask(SIZE, 19, 18, 6, 10),
        ("a b.jpg", "the round cat"): DISC,
        ("c.jpg", "a dog over all"): WHOLE,
    }
    assert same(imported(tmp_path, "label_studio.json"), wanted)


def test_coco_by_label_studio(tmp_path: Path) -> None:
    """It drops texts, turns and brushes; the labels are the sentences."""
    wanted = {
        ("a b.jpg", "cat"): ELL | box_mask(SIZE, 3, 4, 12, 18),
        ("a b.jpg", "dog"): BOX | box_mask(SIZE, 17, 18, 8, 7),
        ("c.jpg", "dog"): WHOLE,
    }
    found = imported(tmp_path, "label_studio_coco.json")
    assert found.keys() == wanted.keys()
    for key, mask in wanted.items():
        differing = found[key] ^ mask
        assert not differing[:25].any() and differing.sum() <= 8, key  # a box that ends within a row of pixels


@pytest.mark.parametrize("spaced", [", ", ","])
def test_a_mask_of_cvats_own_encoder(spaced: str, tmp_path: Path) -> None:
    *runs, left, top, right, bottom = json.loads((EXPORTS / "cvat_mask.json").read_text())
    box = f'left="{left}" top="{top}" width="{right - left + 1}" height="{bottom - top + 1}"'
    shape = f'<mask label="cat" rle="{spaced.join(map(str, runs))}" {box}/>'
    image = f'<image name="a.png" width="40" height="30">{shape}</image>'
    (tmp_path / "annotations.xml").write_text(f"<annotations>{image}</annotations>")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png")
    import_data(tmp_path / "annotations.xml", tmp_path / "out", val=0, test=0)
    assert same(read(tmp_path / "out"), {("a.png", "cat"): DISC})
