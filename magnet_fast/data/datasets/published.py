"""What is published of the field's data sets: counts and where they can be had. `data check` alone reads it."""

from __future__ import annotations

PUBLISHED_REFS: dict[tuple[str, str], dict[str, int]] = {
    ("refcoco", "unc"): {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    ("refcoco+", "unc"): {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    ("refcocog", "umd"): {"train": 42226, "val": 2573, "test": 5023},
    ("refcocog", "google"): {"train": 44822, "val": 5000},
}
"""Refs of each split by data set and splitter, as the data sets' authors publish them (REFER)."""

# The host that REFER names is gone; these copies of it are what the field uses.
_ARCHIVE = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"
SOURCES = {
    "refcoco": _ARCHIVE.format("20220413011718", "refcoco"),
    "refcoco+": _ARCHIVE.format("20220413011656", "refcoco+"),
    "refcocog": _ARCHIVE.format("20220413012904", "refcocog"),
}
"""Annotations by data set."""

IMAGES_SOURCE = "http://images.cocodataset.org/zips/train2014.zip"
"""COCO's train2014 images."""
