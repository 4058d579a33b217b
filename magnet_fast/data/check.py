"""Is a data set on disk complete? Says all that is missing or broken, and where it can be had."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from magnet_fast.data.datasets import open_reader
from magnet_fast.data.datasets.base import Folders
from magnet_fast.data.datasets.published import IMAGES_SOURCE, PUBLISHED_REFS, SOURCES
from magnet_fast.data.datasets.reader import Reader, Ref
from magnet_fast.data.datasets.refer import IMAGE_FOLDERS

_EXAMPLES = 5  # of each kind of problem that are named


@dataclass
class DataReport:
    """What `check_data` found.

    Attributes:
        where: the file that the refs come from, or the folder where there is none.
        counts: split -> (refs, sentences, images).
        problems: sentences, each with what is wrong, where, and what helps; empty for complete data.
        notes: what the reader leaves out, as the field's own readers do; no problem.
    """

    where: str
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_data(
    root: str | os.PathLike[str],
    dataset: str = "refcoco",
    split_by: str = "unc",
    *,
    format: str | None = None,
    images: Folders | None = None,
    masks: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at everything that training and evaluation would use; nothing is changed.

    Checked are the files' presence and form (as the reader reads them), the number of refs of each split against the
    published one, and what `check_reader` looks at.

    Args:
        root, dataset, split_by, format, images: as for `open_reader`.
        masks: decode the masks, too (minutes for a whole data set).
        progress: called with (images done, images in all).
    """
    try:
        with warnings.catch_warnings():  # what is left out stands in the notes
            warnings.simplefilter("ignore", UserWarning)
            reader = open_reader(root, dataset, split_by, format=format, images=images)
    except (FileNotFoundError, ValueError) as error:
        report = DataReport(f"{root}/{dataset}")
        report.problems.append(f"{error}{_advice(str(error), dataset)}")
        return report
    of_coco = "refco" in dataset  # refcoco, refcoco+, refcocog, grefcoco, rrefcoco, ...
    images_advice = f"; COCO's train2014 images: {IMAGES_SOURCE}, unpacked to {root}/{IMAGE_FOLDERS[0]}"
    report = check_reader(
        reader,
        masks=masks,
        progress=progress,
        images_advice=images_advice if of_coco else "",
        masks_advice=_advice("", dataset),
    )
    if not (Path(root) / "scenes.json").exists():  # embedded scenes carry RefCOCO's names, not its contents
        report.problems[:0] = _count_problems(report, dataset, split_by)
    return report


def check_reader(
    reader: Reader,
    *,
    masks: bool = True,
    progress: Callable[[int, int], None] | None = None,
    images_advice: str = "",
    masks_advice: str = "",
) -> DataReport:
    """Look at what a reader reads: every image is there and has the size that the data say, every mask can be decoded
    and is not empty where something is named.

    Args:
        reader: of any format.
        masks, progress: as for `check_data`.
        images_advice, masks_advice: what helps, said behind such a problem.
    """
    report = DataReport(str(reader.source))
    skipped = getattr(reader, "skipped", None)
    for reason, count in (skipped.reasons if skipped else {}).items():
        report.notes.append(f"{count} records left out: {reason} ({', '.join(skipped.examples[reason])} ...)")
    refs_of: dict[int, list[Ref]] = {}
    for split in reader.splits:
        refs = reader.refs(split)
        report.counts[split] = (
            len(refs), sum(len(ref.sentences) for ref in refs), len({ref.image_id for ref in refs}),
        )  # fmt: skip
        for ref in refs:
            refs_of.setdefault(ref.image_id, []).append(ref)

    sizes_from = getattr(reader, "instances_path", reader.source).name
    absent, damaged, other_size, bad_masks = [], [], [], []
    for done, (image_id, refs) in enumerate(refs_of.items(), start=1):
        try:
            path = reader.image_path(image_id)
            with Image.open(path) as picture:
                width, height = picture.size  # the header only
        except FileNotFoundError as error:
            absent.append(str(error))
        except OSError as error:  # Pillow's errors, too
            damaged.append(f"{path}: {error}")
        else:
            if (height, width) != reader.image_size(image_id):
                expected = "x".join(map(str, reader.image_size(image_id)))
                other_size.append(f"{path} is {height}x{width}, {sizes_from} says {expected} (height x width)")
        if masks:
            bad_masks += _mask_problems(reader, refs)
        if progress:
            progress(done, len(refs_of))
    report.problems += _summary(absent, "image", "absent", images_advice)
    report.problems += _summary(damaged, "image", "unreadable", images_advice)
    report.problems += _summary(other_size, "image", "of another size", images_advice)
    report.problems += _summary(bad_masks, "mask", "unusable", masks_advice)
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


def _mask_problems(reader: Reader, refs: list[Ref]) -> list[str]:
    problems = []
    for ref in refs:
        try:
            named = ref.ann_ids or any(sentence.exists for sentence in ref.sentences)
            empty = named and not reader.mask(ref).any()
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
