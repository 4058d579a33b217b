"""Overlays and contact sheets: what is drawn where, whatever the sentence."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from magnet_fast.visualize import Example, contact_sheet, overlay, overlay_each, roles_and_instances

EXPRESSION, TRUTH = 208, 427  # where these columns begin, in a sheet of cells of 192 pixels


def drawn(text: str, note: str = "", size: tuple[int, int] = (64, 64), **options: object) -> np.ndarray:
    nothing = np.zeros(size[::-1], dtype=bool)
    example = Example(Image.new("RGB", size), text, nothing, nothing, note)
    return np.asarray(contact_sheet([example], **options).convert("L")).astype(int)


def differing(first: np.ndarray, second: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of where two sheets differ."""
    rows, columns = np.nonzero(np.abs(first - second) > 60)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_overlay_tints_the_mask_and_fades_the_rest() -> None:
    image = np.full((40, 50, 3), (200, 40, 40), dtype=np.uint8)
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:30, 15:35] = True
    drawn = np.asarray(overlay(image, mask, colour=(0, 0, 255)))
    assert drawn.shape == image.shape
    assert (drawn[10, 15:35] == (0, 0, 255)).all()  # the outline
    assert drawn[20, 25, 2] > 100 and drawn[20, 25, 0] > 100  # a tint, not paint
    outside = drawn[2, 2].astype(int)
    assert outside.min() > 120 and np.ptp(outside) < 80  # faded
    assert (image == (200, 40, 40)).all()
    with pytest.raises(ValueError, match="image's height and width"):
        overlay(image, mask.T)


def test_several_masks_keep_their_colours_and_mix_where_they_meet() -> None:
    image = np.full((40, 60, 3), (200, 40, 40), dtype=np.uint8)
    left, right = np.zeros((2, 40, 60), dtype=bool)
    left[10:30, 5:35], right[10:30, 25:55] = True, True
    drawn = np.asarray(overlay_each(image, [left, right], [(0, 0, 255), (0, 255, 0)]))
    alone = np.asarray(overlay(image, left, colour=(0, 0, 255)))
    assert np.array_equal(drawn[:, :25], alone[:, :25])  # beside the second mask nothing changes
    assert (drawn[10:30, 25] == (0, 255, 0)).all() and (drawn[11:29, 5] == (0, 0, 255)).all()
    only, both = drawn[20, 15].astype(int), drawn[20, 30].astype(int)
    assert both[1] > only[1] + 30 and both[2] < only[2]  # a second tint over the first
    assert np.ptp(drawn[2, 2].astype(int)) < 80  # in neither: faded
    with pytest.raises(ValueError, match="colours: expected one of each of 2 masks, got 1"):
        overlay_each(image, [left, right], [(0, 0, 255)])


def test_contact_sheet_shows_every_example() -> None:
    def example(width: int, height: int, colour: tuple) -> Example:
        mask = np.zeros((height, width), dtype=bool)
        mask[: height // 2] = True
        return Example(Image.new("RGB", (width, height), colour), "the left one " * 6, mask, mask, "IoU 100 %")

    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    examples = [example(60, 40, colours[0]), example(40, 60, colours[1]), example(50, 50, colours[2])]
    one, two = contact_sheet(examples, cell=96), contact_sheet(examples, columns=2, cell=96, title="a title")
    assert two.width > 1.9 * one.width and two.height < one.height
    for sheet in (one, two):
        pixels = np.asarray(sheet).reshape(-1, 3)
        for colour in colours:
            assert (pixels == colour).all(axis=1).sum() > 96 * 50
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


@pytest.mark.parametrize("text", ["w" * 80, "W" * 5000, "a " + "i" * 300, "word " * 500, "x\n\ty " * 9])
def test_text_stays_in_its_column_and_row(text: str) -> None:
    left, top, right, bottom = differing(drawn(""), drawn(text))
    assert left >= EXPRESSION and right <= TRUTH - 8
    note = differing(drawn(""), drawn("", "IoU 50 %"))[1]
    assert top > 32 and bottom <= note


def test_notes_and_titles_stay_on_the_sheet() -> None:
    left, _, right, bottom = differing(drawn("", "I"), drawn("", "IoU 100 % " * 50))
    assert left >= EXPRESSION and right <= TRUTH - 8 and bottom <= drawn("").shape[0]
    short, long = drawn("", title="title"), drawn("", title="title " * 200)
    assert short.shape == long.shape and differing(short, long)[2] <= long.shape[1] - 8


def test_a_sentence_that_is_too_long_ends_in_dots() -> None:
    """Two that differ beyond what fits look alike; that something is missing is seen."""
    text = "the red one on the left of the tallest blue box, " * 8
    assert np.array_equal(drawn(text), drawn(text + "and more"))
    assert not np.array_equal(drawn(text), drawn(text[: len(text) // 2]))


@pytest.mark.parametrize(
    ("texts", "codes"),
    [
        (("红色", "蓝猫"), r"4 letters, drawn as their codes: \\u732b, \\u7ea2, \\u8272, \\u84dd$"),
        (("\N{GRINNING FACE}", "\N{CAT FACE}"), r"2 letters, drawn as their codes: \\U0001f431, \\U0001f600$"),
        (("أحمر", "أزرق"), "6 letters, drawn as their codes: .*, …$"),
        (("a\u200b", "a\u200d"), r"2 letters, drawn as their codes: \\u200b, \\u200d$"),
        (("\x00", "\ud800"), r"2 letters, drawn as their codes: \\ud800, \\x00$"),
    ],
)
def test_letters_that_the_font_lacks_are_told_and_told_apart(texts: tuple[str, str], codes: str) -> None:
    nothing = np.zeros((8, 8), dtype=bool)
    examples = [Example(Image.new("RGB", (8, 8)), text, nothing, nothing) for text in texts]
    with pytest.warns(UserWarning, match=f"contact sheet: the font lacks {codes}") as said:
        contact_sheet(examples)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = map(drawn, texts)
    left, _, right, _ = differing(first, second)
    assert left >= EXPRESSION and right <= TRUTH - 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn("the “red” one, 50 % …", "IoU 3 %")


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    assert drawn("a", size=size).shape == drawn("a").shape
    assert overlay(Image.new("RGB", size), np.ones(size[::-1])).size == size


def test_pixels_of_more_than_8_bits_are_refused() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    grey = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match="image: expected 8 bits a pixel, got mode I;16; .*as_rgb makes it so"):
        overlay(grey, mask)
    with pytest.raises(ValueError, match="image: expected uint8, got float32"):
        overlay(np.zeros((4, 4, 3), dtype=np.float32), mask)
    with pytest.raises(ValueError, match="got mode I;16"):
        contact_sheet([Example(grey, "a", mask, mask)])


def test_roles_and_instances() -> None:
    """A word of a role is as dark as its part says, and pixels of one instance are tinted alike."""
    image = Image.new("RGB", (60, 40), (120, 120, 120))
    instances = np.zeros((2, 4, 6))
    instances[0, :, :3] = instances[1, :, 3:] = 0.9
    roles = np.array([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]])
    sheet = np.asarray(roles_and_instances(image, ["the", "red", "one"], roles, instances, ["first", "last"]))
    inner = sheet[10:30, 5:25], sheet[10:30, 35:55]
    assert all((part == part[0, 0]).all() for part in inner) and (inner[0][0, 0] != inner[1][0, 0]).any()
    rows = [set(map(tuple, sheet[y].reshape(-1, 3).tolist())) for y in (47, 47 + (sheet.shape[0] - 46) // 2)]
    assert (0, 0, 0) in rows[0] and (64, 64, 64) in rows[1] and (191, 191, 191) in rows[1]
    with pytest.raises(ValueError, match=r"roles: expected 2 rows for 2 words, got \(2, 3\)"):
        roles_and_instances(image, ["the", "one"], roles, instances, ["first", "last"])
