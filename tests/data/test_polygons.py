"""Polygons written for a mask decode to that mask, by pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from magnet_fast.data.polygons import mask_to_polygons


def decode(polygons: list[list[int]], height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


@given(mask=arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(np.any))
def test_any_mask_comes_back(mask):
    assert np.array_equal(decode(mask_to_polygons(mask), *mask.shape), mask)


def test_large_ragged_mask_comes_back():
    mask = np.random.default_rng(0).random((97, 61)) < 0.5
    assert np.array_equal(decode(mask_to_polygons(mask), 97, 61), mask)


@pytest.mark.parametrize("inner", [0, 1, 3])
def test_ring_within_ring(inner):
    mask = np.zeros((20, 20), dtype=bool)
    for border, value in ((1, True), (3, False), (5, True), (7 + inner // 2, inner == 0)):
        mask[border : 20 - border, border : 20 - border] = value
    polygons = mask_to_polygons(mask)
    assert np.array_equal(decode(polygons, 20, 20), mask)


def test_parts_without_holes_are_polygons_of_their_own():
    mask = np.zeros((10, 10), dtype=bool)
    mask[1:3, 1:4] = mask[6:9, 5:7] = True
    assert sorted(mask_to_polygons(mask)) == [[1, 1, 4, 1, 4, 3, 1, 3], [5, 6, 7, 6, 7, 9, 5, 9]]


def test_empty_mask_has_no_polygon():
    assert mask_to_polygons(np.zeros((4, 4), dtype=bool)) == []
