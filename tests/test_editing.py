"""Edits: what an operation does inside, that nothing happens outside, and what is refused."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from magnet_fast import Segmenter, editing
from magnet_fast.cli import app
from magnet_fast.editing import Outside, edited

NAMED = ["colour=#2040ff", "blur", "blur=3", "grey", "brightness=1.4", "brightness=0"]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc(height: int = 30, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - 12) ** 2 + (x - 20) ** 2 < 81


def steps_to_outside(mask: np.ndarray) -> np.ndarray:
    """By a walk from all pixels outside, to all eight neighbours."""
    steps = np.where(mask, 10**6, 0)
    queue = deque(zip(*np.nonzero(~mask), strict=True))
    while queue:
        y, x = queue.popleft()
        for v in range(max(0, y - 1), min(mask.shape[0], y + 2)):
            for u in range(max(0, x - 1), min(mask.shape[1], x + 2)):
                if steps[v, u] > steps[y, x] + 1:
                    steps[v, u] = steps[y, x] + 1
                    queue.append((v, u))
    return steps


@pytest.mark.parametrize("feather", [0, 1, 4])
@pytest.mark.parametrize("operation", [*NAMED, lambda pixels: 255 - pixels])
def test_the_outside_is_bit_equal(operation, feather: int) -> None:
    image, mask = noise(30, 40), disc()
    found = edited(image, mask, operation, feather)
    assert found.mode == "RGB" and found.size == (40, 30)
    pixels = np.asarray(found)
    assert np.array_equal(pixels[~mask], image[~mask])
    assert (pixels[mask] != image[mask]).any()


@given(
    mask=st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=9)
    ),
    feather=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_the_change_sets_in_over_the_feather_inside_the_mask(mask: list, feather: int, seed: int) -> None:
    mask = np.array(mask)
    image, other = noise(*mask.shape, seed), noise(*mask.shape, seed + 1)
    share = (np.minimum(steps_to_outside(mask), feather + 1) / (feather + 1))[..., None]
    inside = np.asarray(edited(image, mask, lambda _: other, feather))
    assert np.abs(inside - (share * other + (1 - share) * image)).max() <= 0.5 + 1e-9
    outside = np.asarray(edited(image, mask, Outside(lambda _: other), feather))
    assert np.abs(outside - (share * image + (1 - share) * other)).max() <= 0.5 + 1e-9


def test_what_operations_do() -> None:
    image, all_of_it = noise(6, 7), np.ones((6, 7), bool)

    def done(operation: str) -> np.ndarray:
        return np.asarray(edited(image, all_of_it, operation))

    painted = image.max(axis=2, keepdims=True) * np.array([32, 64, 255]) / 255
    assert np.abs(done("colour=#2040ff") - painted).max() <= 0.5
    assert np.array_equal(done("colour=white"), np.repeat(image.max(axis=2, keepdims=True), 3, axis=2))
    assert np.abs(done("brightness=1.4") - np.minimum(1.4 * image, 255)).max() <= 0.5
    assert np.abs(done("grey") - (image @ [0.299, 0.587, 0.114])[..., None]).max() < 1
    assert np.array_equal(done("blur=3"), Image.fromarray(image).filter(ImageFilter.GaussianBlur(3)))


def test_a_cut_out_keeps_what_is_named_and_nothing_else() -> None:
    image, mask = noise(30, 40), disc()
    found = np.asarray(edited(image, mask, "cut-out", 2))
    assert found.shape == (30, 40, 4)
    assert not found[~mask].any()  # colours too: nothing can be brought back
    assert np.array_equal(found[mask][:, :3], image[mask])
    alpha = np.minimum(steps_to_outside(mask), 3) * 255 / 3
    assert np.array_equal(found[..., 3], alpha.round())


@pytest.mark.parametrize("size", [(40, 30), (20, 15), (100, 30), (33, 77), (1, 1)])
def test_a_background_of_any_size_covers(size: tuple[int, int], tmp_path: Path) -> None:
    image, mask = noise(30, 40), disc()
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "behind=it.png")
    found = np.asarray(edited(image, mask, f"background={tmp_path / 'behind=it.png'}"))
    assert np.array_equal(found[mask], image[mask])
    assert (found[~mask] == (10, 200, 30)).all()


def test_a_background_of_the_same_size_is_not_touched_and_a_photo_is_turned(tmp_path: Path) -> None:
    behind = Image.fromarray(noise(30, 40, 1))
    exif = Image.Exif()
    exif[0x0112] = 3
    behind.save(tmp_path / "photo.png", exif=exif)
    nothing = np.zeros((30, 40), bool)
    assert np.array_equal(edited(noise(30, 40), nothing, editing.background(behind)), behind)
    turned = edited(noise(30, 40), nothing, f"background={tmp_path / 'photo.png'}")
    assert np.array_equal(turned, behind.transpose(Image.Transpose.ROTATE_180))


def test_an_operation_that_writes_to_what_it_gets_changes_nothing_outside() -> None:
    def clear(pixels: np.ndarray) -> np.ndarray:
        pixels[:] = 0
        return pixels

    image, mask = noise(30, 40), disc()
    before = image.copy()
    found = np.asarray(edited(image, mask, clear))
    assert np.array_equal(image, before) and np.array_equal(found[~mask], before[~mask]) and not found[mask].any()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ("sepia", "operation: expected one of colour, blur, .*, got 'sepia'"),
        ("colour", "operation: expected colour=VALUE, got 'colour'"),
        ("blur=", "operation: expected blur=VALUE, got 'blur='"),
        ("grey=3", "operation: expected grey without a value, got 'grey=3'"),
        ("colour=reddish", "colour: expected #rrggbb or a name such as red, got 'reddish'"),
        ("colour=#ff000080", "colour: expected #rrggbb"),
        ("blur=-1", "blur: expected a number from 0 to 1000, got '-1'"),
        ("brightness=nan", "brightness: expected a number from 0 to 255, got 'nan'"),
        ("brightness=much", "brightness: expected a number"),
        ("background=nowhere.png", "image nowhere.png does not exist"),
        (7, "operation: expected a name or a function, got int"),
        (lambda pixels: pixels[1:], r"operation: expected an array \(30, 40, 3\) uint8 from it, got \(29, 40, 3\)"),
        (lambda pixels: pixels / 255, "float64"),
        (lambda pixels: None, "operation: expected an array"),
    ],
)
def test_bad_operations(operation, message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        edited(noise(30, 40), disc(), operation)


def test_a_change_outside_is_a_function() -> None:
    for change in ("grey", None, editing.cut_out()):
        with pytest.raises(TypeError, match=r"change: expected a function of an image, such as editing\.grey\(\), got"):
            Outside(change)
    for colour in (7, None, ("red",)):
        with pytest.raises(ValueError, match="colour: expected #rrggbb or a name such as red, got"):
            editing.colour(colour)


def test_bad_masks_and_feathers() -> None:
    with pytest.raises(ValueError, match=r"mask: expected shape \(30, 40\), the image's, got \(40, 30\)"):
        edited(noise(30, 40), disc().T, "grey")
    with pytest.raises(ValueError, match="mask has shape .* and dtype float64; expected"):
        edited(noise(30, 40), 0.3 * disc(), "grey")  # probabilities, not where they are high
    for feather in (-1, 1.5, True, 1001, 2**40):
        with pytest.raises(ValueError, match="feather: expected a whole number"):
            edited(noise(30, 40), disc(), "grey", feather)


def test_a_mask_that_fills_the_frame_has_no_border(monkeypatch) -> None:
    monkeypatch.setattr(Image.Image, "filter", lambda *_: pytest.fail("it would be eroded a thousand times"))
    found = edited(noise(30, 40), np.ones((30, 40), bool), lambda pixels: 255 - pixels, 1000)
    assert np.array_equal(found, 255 - noise(30, 40))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_checkpoint(pack=False)


EXAMPLE = Path(__file__).parents[1] / "docs" / "example.jpg"
SQUARE = "the square below the little cyan thing"


def test_a_segmenter_edits_a_photo_as_a_viewer_shows_it(segmenter: Segmenter, tmp_path: Path) -> None:
    upright = Image.open(EXAMPLE).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    mask = segmenter(upright, SQUARE).mask
    assert 0 < mask.mean() < 0.5
    found = np.asarray(segmenter.edit(tmp_path / "photo.png", SQUARE, "grey", feather=1))
    assert np.array_equal(found[~mask], np.asarray(upright)[~mask])
    assert np.array_equal(found, edited(upright, mask, "grey", 1))
    with pytest.raises(ValueError, match="operation: expected one of"):
        segmenter.edit(tmp_path / "none.png", SQUARE, "gray")  # told before the picture is read


def test_the_command(segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "new" / "edited.png"

    def run(*more: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["edit", str(EXAMPLE), SQUARE, *map(str, more)])
        return result.exit_code, result.output

    status, said = run("--operation", "colour=#ff2020", "--feather", 3, "--out", out)
    assert status == 0 and f"{out}: " in said
    assert np.array_equal(Image.open(out), segmenter.edit(EXAMPLE, SQUARE, "colour=#ff2020", feather=3))
    monkeypatch.setattr(Segmenter, "from_checkpoint", lambda *_, **__: pytest.fail("it was loaded before"))
    for more, message in (
        (["--operation", "cut-out", "--out", tmp_path / "cut.jpg"], "cut-out needs a format with transparency"),
        (["--operation", "paint", "--out", tmp_path / "cut.png"], "operation: expected one of"),
        (["--operation", f"background={tmp_path / 'none.png'}", "--out", tmp_path / "cut.png"], "does not exist"),
        (["--operation", "grey", "--out", tmp_path / "cut.txt"], "not the name of a picture"),
        (["--operation", "grey", "--out", tmp_path / "cut.png", "--feather", 1001], "feather: expected a whole number"),
    ):
        status, said = run(*more)
        assert status == 2 and said.startswith("error: ") and message in said
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
