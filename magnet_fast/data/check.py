"""Is a folder of RefCOCO, RefCOCO+ or G-Ref complete? Says all that is missing or broken, and where it can be had."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from magnet_fast.data.refer import IMAGE_FOLDERS, Refer

PUBLISHED_REFS: dict[tuple[str, str], dict[str, int]] = {
    ("refcoco", "unc"): {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    ("refcoco+", "unc"): {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    ("refcocog", "umd"): {"train": 42226, "val": 2573, "test": 5023},
    ("refcocog", "google"): {"train": 44822, "val": 5000},
}
"""Referents of each split, as the data sets' authors publish them (REFER)."""

# The host that REFER names is gone; these copies of it are what the field uses.
_ARCHIVE = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"
SOURCES = {
    "refcoco": _ARCHIVE.format("20220413011718", "refcoco"),
    "refcoco+": _ARCHIVE.format("20220413011656", "refcoco+"),
    "refcocog": _ARCHIVE.format("20220413012904", "refcocog"),
}
IMAGES_SOURCE = "http://images.cocodataset.org/zips/train2014.zip"

_EXAMPLES = 5  # of each kind of problem that are named


@dataclass
class DataReport:
    """What `check_data` found.

    Attributes:
        where: the refs file, or the folder where there is none.
        counts: split -> (refs, sentences, images).
        problems: sentences, each with what is wrong, where, and what helps; empty for complete data.
    """

    where: str
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_data(
    root: str | os.PathLike[str],
    dataset: str = "refcoco",
    split_by: str = "unc",
    *,
    masks: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at everything that training and evaluation would use; nothing is changed.

    Checked are the files' presence and form (as `Refer` reads them), the number of refs of each split against
    the published one, that every image is there and has the size that instances.json gives, and that every mask
    can be decoded and is not empty.

    Args:
        root, dataset, split_by: as for `Refer`.
        masks: decode the masks, too (minutes for a whole data set).
        progress: called with (images done, images in all).
    """
    report = DataReport(f"{root}/{dataset}")
    try:
        refer = Refer(root, dataset, split_by)
    except (FileNotFoundError, ValueError) as error:
        report.problems.append(f"{error}{_advice(str(error), dataset)}")
        return report
    report.where = str(refer.refs_path)
    refs_of: dict[int, list] = {}
    for split in refer.splits:
        refs = refer.refs(split)
        images = {ref.image_id for ref in refs}
        report.counts[split] = (len(refs), sum(len(ref.sentences) for ref in refs), len(images))
        for ref in refs:
            refs_of.setdefault(ref.image_id, []).append(ref)
    if not (refer.root / "scenes.json").exists():  # embedded scenes carry RefCOCO's names, not its contents
        report.problems += _count_problems(report, dataset, split_by)

    absent, damaged, other_size, bad_masks = [], [], [], []
    for done, (image_id, refs) in enumerate(refs_of.items(), start=1):
        try:
            path = refer.image_path(image_id)
            with Image.open(path) as picture:
                width, height = picture.size  # the header only
        except FileNotFoundError as error:
            absent.append(str(error))
        except OSError as error:  # Pillow's errors, too
            damaged.append(f"{path}: {error}")
        else:
            if (height, width) != refer.image_size(image_id):
                expected = "x".join(map(str, refer.image_size(image_id)))
                other_size.append(f"{path} is {height}x{width}, instances.json says {expected} (height x width)")
        if masks:
            bad_masks += _mask_problems(refer, refs)
        if progress:
            progress(done, len(refs_of))
    images_advice = f"; COCO's train2014 images: {IMAGES_SOURCE}, unpacked to {root}/{IMAGE_FOLDERS[0]}"
    report.problems += _summary(absent, "image", "absent", images_advice)
    report.problems += _summary(damaged, "image", "unreadable", images_advice)
    report.problems += _summary(other_size, "image", "of another size", images_advice)
    report.problems += _summary(bad_masks, "mask", "unusable", _advice("", dataset))
    return report


def _count_problems(report: DataReport, dataset: str, split_by: str) -> list[str]:
    published = PUBLISHED_REFS.get((dataset, split_by))
    if published is None:
        return []
    problems = []
    for split in {**published, **report.counts}:
        found, expected = report.counts.get(split, (0, 0, 0))[0], published.get(split, 0)
        if found != expected:
            problems.append(f"{report.where}: split {split} has {found} refs, published are {expected}")
    if problems:
        problems[-1] += _advice("", dataset)
    return problems


def _mask_problems(refer: Refer, refs: list) -> list[str]:
    problems = []
    for ref in refs:
        try:
            empty = bool(ref.ann_ids) and not refer.mask(ref).any()
        except ValueError as error:
            problems.append(str(error))
        else:
            if empty:
                problems.append(f"ref_id {ref.ref_id}: its annotation covers no pixel of the image")
    return problems


def _summary(found: list[str], noun: str, state: str, advice: str) -> list[str]:
    if not found:
        return []
    more = f"; and {len(found) - _EXAMPLES} more" if len(found) > _EXAMPLES else ""
    plural = noun if len(found) == 1 else f"{noun}s"
    return [f"{len(found)} {plural} {state}: {'; '.join(found[:_EXAMPLES])}{more}{advice}"]


def _advice(error: str, dataset: str) -> str:
    if "image folder" in error:
        return f"; COCO's train2014 images: {IMAGES_SOURCE}"
    return f"; the annotations of {dataset}: {SOURCES[dataset]}" if dataset in SOURCES else ""
