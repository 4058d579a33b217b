"""COCO's segmentations: decoded as pycocotools and a slow loop do, and refused before they could do harm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from magnet_fast.data.segmentation import MARGIN, MAX_CHARACTERS, check_segmentation, decode_segmentation

HEIGHT, WIDTH = 20, 30


def runs_of(mask: np.ndarray) -> list[int]:
    """Uncompressed counts by a plain loop down the columns, zeros first."""
    counts, value = [0], 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def packed(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask))


def inside(x: float, y: float, polygon: list[float]) -> bool:
    """Even-odd rule by a ray to the right."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    crossed = False
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            crossed = not crossed
    return crossed


def border_distance(x: float, y: float, polygon: list[float]) -> float:
    points = [complex(a, b) for a, b in zip(polygon[::2], polygon[1::2], strict=True)]
    nearest = math.inf
    for start, end in zip(points, points[1:] + points[:1], strict=True):
        side = end - start
        along = ((complex(x, y) - start) * side.conjugate()).real / abs(side) ** 2 if side else 0.0
        nearest = min(nearest, abs(complex(x, y) - start - min(max(along, 0), 1) * side))
    return nearest


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_every_form_of_rle(height, width, share, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    rle = packed(mask)
    plain = {"size": [height, width], "counts": runs_of(mask)}
    for form in (rle, {**rle, "counts": rle["counts"].decode()}, plain, [plain]):
        decoded = decode_segmentation(form, height, width)
        assert decoded.dtype == np.uint8 and np.array_equal(decoded, mask)


def test_long_runs_need_several_digits():
    mask = np.zeros((1500, 1200), dtype=np.uint8)
    mask[700, 600] = mask[3, 1199] = mask[0, 0] = 1
    assert np.array_equal(decode_segmentation(packed(mask), 1500, 1200), mask)


def test_polygons_agree_with_a_slow_loop_away_from_borders():
    polygons = [[2.5, 3, 14, 1.5, 11, 16, 6, 9], [20.0, 4, 29, 4, 29, 18, 18, 12.25]]
    mask = decode_segmentation(polygons, HEIGHT, WIDTH)
    compared = 0
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if min(border_distance(x + 0.5, y + 0.5, one) for one in polygons) > 1:
                assert mask[y, x] == any(inside(x + 0.5, y + 0.5, one) for one in polygons), (y, x)
                compared += 1
    assert compared > 350 and mask.sum() > 100


def test_whole_pixels_are_exact_and_parts_are_united():
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[3:9, 2:10] = mask[10:15, 20:25] = 1
    square, other = [2, 3, 10, 3, 10, 9, 2, 9], [20, 10, 25, 10, 25, 15, 20, 15]
    assert np.array_equal(decode_segmentation([square, other], HEIGHT, WIDTH), mask)
    first, second = (decode_segmentation([one], HEIGHT, WIDTH) for one in (square, other))
    assert np.array_equal(decode_segmentation([packed(first), packed(second)], HEIGHT, WIDTH), mask)
    assert np.array_equal(decode_segmentation([packed(first), other], HEIGHT, WIDTH), mask)
    # two points cover nothing: pycocotools would read four numbers as a box
    assert np.array_equal(decode_segmentation([square, [0, 0, 30, 20]], HEIGHT, WIDTH), first)
    # over the edge by less than a few sides: cut off
    wide = decode_segmentation([[-40, 3, 70, 3, 70, 9, -40, 9]], HEIGHT, WIDTH)
    assert wide[3:9].all() and not wide[9:].any() and not wide[:3].any()


SQUARE = [2, 3, 10, 3, 10, 9, 2, 9]
BAD = [
    (None, "no polygon of three points"),
    ("polygon", r"segmentation is 'polygon'; expected \[\[x1, y1,"),
    ([], r"no polygon of three points \(x and y in turn\) and no RLE"),
    ([[0, 0, 5, 5]], "no polygon of three points"),
    ({"type": "Polygon", "coordinates": [[[1, 1], [9, 1], [9, 9]]]}, "'type': 'Polygon'}, without counts; expected"),
    ([{"x": 1, "y": 2}, {"x": 9, "y": 2}], "segmentation holds {'x': 1, 'y': 2}, without counts; expected"),
    ([[{"Size": [20, 30], "Counts": [600]}]], "'Size': .20, 30.}, without counts"),
    ([3, 4, 5, 6], "no polygon of three points"),
    (7, "segmentation is 7; expected"),
    ([[2, 3, 10, 3, 10, 9, 2]], "no polygon of three points"),
    ([[2, 3, 10, 3, 10, 9], 3], "segmentation holds 3 beside lists"),
    ([[[[[2, 3, 10, 3, 10, 9]]]]], "nested too deep"),
    ([["2"] * 100_000], "expected numbers"),
    ([[2, 3, 10, 3, 10, "x" * 10**7]], "expected numbers"),
    ([[2, 3, 10, "3", 10, 9]], "expected numbers"),
    ([[2, 3, 10, None, 10, 9]], "expected numbers"),
    ([[2, 3, 10, [1], 10, 9]], r"polygon holds \[1\]; expected numbers"),
    ([True, SQUARE], "segmentation holds true beside lists"),
    ([[True, False, True, True, False, False]], "expected numbers"),
    ([[2, 3, 10, math.nan, 10, 9]], "not finite"),
    ([SQUARE, [2, 3, math.inf, 3, 10, 9]], "not finite"),
    ([[2, 3, 1e9, 3, 10, 9]], "more than 3 times that side outside"),
    ([[2, 3, 10, 3, 10, -(MARGIN * HEIGHT) - 1]], "in y, the image from 0 to 20"),
    ([[2, 3, 10**30, 3, 10, 9]], "more than 3 times that side outside"),
    ([[2, 3, 10**400, 3, 10, 9]], "not finite"),
    ([[0, 0, 120, 79] * 100_000], "an outline of .* pixels; expected at most"),
    ([SQUARE] * 65_537, "65537 parts; on 20 x 30 pixels expected at most 65536"),
    ([{"size": [20, 30], "counts": [600]}] * 65_537, "65537 parts; on 20 x 30 pixels expected at most 65536"),
    ({"size": [HEIGHT, WIDTH]}, "without counts"),
    ({"counts": [600]}, "RLE has size null"),
    ({"size": [WIDTH, HEIGHT], "counts": [600]}, r"RLE has size \[30, 20\]; the image has \[20, 30\]"),
    ({"size": [HEIGHT, WIDTH], "counts": [599]}, "RLE fills 599 pixels"),
    ({"size": [HEIGHT, WIDTH], "counts": [590, 11]}, "RLE fills 601 pixels"),
    ({"size": [HEIGHT, WIDTH], "counts": [610, -10]}, "a run of"),
    ({"size": [HEIGHT, WIDTH], "counts": [-10, 300, 310]}, "a run of -10"),
    ({"size": [HEIGHT, WIDTH], "counts": [1.5, 598.5]}, "expected whole numbers"),
    ({"size": [HEIGHT, WIDTH], "counts": [2**62, 2**62, 2**62, 2**62, 600]}, f"a run of {2**62}"),
    ({"size": [HEIGHT, WIDTH], "counts": []}, "no RLE"),
    ({"size": [HEIGHT, WIDTH], "counts": ""}, "no RLE"),
    ({"size": [HEIGHT, WIDTH], "counts": [0]}, "RLE fills 0 pixels"),
    ({"size": [HEIGHT, WIDTH], "counts": 600}, "RLE has counts 600; expected a list, str or bytes"),
    ({"size": [HEIGHT, WIDTH], "counts": [math.nan, 600]}, "expected whole numbers"),
    ({"size": [HEIGHT, WIDTH], "counts": [True, 599]}, "expected whole numbers"),
    ({"size": [HEIGHT, WIDTH], "counts": ["600"]}, "expected whole numbers"),
    ({"size": [HEIGHT, WIDTH], "counts": [10**400]}, "a run of inf"),
    ({"size": ["20", "30"], "counts": [600]}, "RLE has size"),
    ({"size": [HEIGHT, WIDTH], "counts": "0" * (MAX_CHARACTERS + 1)}, "characters; expected at most"),
    ({"size": [HEIGHT, WIDTH], "counts": "hel lo"}, "character that is not between"),
    ({"size": [HEIGHT, WIDTH], "counts": "hé"}, "COCO's characters"),
    ({"size": [HEIGHT, WIDTH], "counts": "0P"}, "break off within a number"),
    ({"size": [HEIGHT, WIDTH], "counts": "PPPPPPPP0"}, "a number of 9 digits"),
    ({"size": [HEIGHT, WIDTH], "counts": "00"}, "RLE fills 0 pixels"),
]


@pytest.mark.parametrize(("segmentation", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_segmentations_are_refused_in_words(segmentation, message):
    with pytest.raises(ValueError, match=message):
        check_segmentation(segmentation, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "nested",
    [
        SQUARE,
        [[2, 3], [10, 3], [10, 9], [2, 9]],
        [[[2, 3], [10, 3], [10, 9], [2, 9]]],
        [[[2, 3, 10, 3, 10, 9, 2, 9]]],
        [[[[2, 3], [10, 3], [10, 9], [2, 9]]]],
        [SQUARE, [], [1, 2], [1, 2, 3, 4, 5]],
        {"size": [20.0, 30.0], "counts": [43.0, *([6.0, 14.0] * 7), 6.0, 411.0]},
    ],
)
def test_other_nestings_of_plain_meaning(nested):
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[3:9, 2:10] = 1
    assert np.array_equal(decode_segmentation(nested, HEIGHT, WIDTH), expected)


def test_two_polygons_in_points_are_two():
    mask = decode_segmentation([[[2, 3], [10, 3], [10, 9], [2, 9]], [[20, 10], [25, 10], [25, 15], [20, 15]]], 20, 30)
    assert mask.sum() == 8 * 6 + 5 * 5


def test_an_image_too_large_to_draw_on_is_refused_before_memory_is_taken():
    for height, width in ((2**31, 2**31), (13_378, 13_378), (1, 1_000_001)):
        with pytest.raises(ValueError, match=f"the image has {height} x {width} pixels; expected at most"):
            decode_segmentation([SQUARE], height, width)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="".join(map(chr, range(48, 112))), max_size=12))
def test_no_string_of_counts_does_harm(counts):
    """Either refused, or a mask of the right shape that pycocotools reads alike."""
    rle = {"size": [2, 3], "counts": counts}
    try:
        mask = decode_segmentation(rle, 2, 3)
    except ValueError:
        return
    assert np.array_equal(mask, coco_mask.decode(rle))
