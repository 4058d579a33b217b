"""Is a data set on disk complete? Says all that is missing or broken, and where it can be had."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from magnet_fast.data.datasets import open_reader
from magnet_fast.data.datasets.base import PUT_THERE, BrokenRecordsError, Folders
from magnet_fast.data.datasets.published import IMAGES_SOURCE, PUBLISHED_REFS, SOURCES
from magnet_fast.data.datasets.reader import Reader, Ref, Tally
from magnet_fast.data.datasets.refer import IMAGE_FOLDERS, SPLITS, Refer
from magnet_fast.data.scenes.word_kinds import are_scenes
from magnet_fast.data.transforms.pictures import check_range, open_image, opened, orientation

_LAST_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""What a whole file of a format has at its end: pictures whose download broke off lack it."""
_TAIL = 4096
_STATES = ("absent", "unreadable", "of another size")  # of images, in the order in which they are told


@dataclass
class DataReport:
    """What `check_data` found.

    Attributes:
        where: the file that the refs come from, or the folder where there is none.
        counts: split -> (refs, sentences, images).
        problems: sentences, each with what is wrong, how often, where first, and what helps; empty for complete data.
        notes: what the reader leaves out, as the field's own readers do, and what may surprise; no problem.
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
    except BrokenRecordsError as error:
        reader = error.reader
    except (OSError, ValueError) as error:
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
    if not are_scenes(Path(root)):  # embedded scenes carry RefCOCO's names, not its contents
        report.problems[:0] = _count_problems(report, dataset, split_by)
        if isinstance(reader, Refer) and (dataset, split_by) not in PUBLISHED_REFS:
            (report.problems if of_coco else report.notes)[:0] = _other_splits(reader)
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
    told = {name: getattr(reader, name).told() for name in ("skipped", "broken", "doubtful") if hasattr(reader, name)}
    report.notes += [f"left out {one}" for one in told.get("skipped", [])]
    report.problems += told.get("broken", []) + told.get("doubtful", [])
    refs_of: dict[int, list[Ref]] = {}
    for split in reader.splits:
        refs = reader.refs(split)
        report.counts[split] = (
            len(refs), sum(len(ref.sentences) for ref in refs), len({ref.image_id for ref in refs}),
        )  # fmt: skip
        for ref in refs:
            refs_of.setdefault(ref.image_id, []).append(ref)

    images, bad_masks, turned = Tally(dict.fromkeys(_STATES, 0)), Tally(), Tally()
    for done, (image_id, refs) in enumerate(refs_of.items(), start=1):
        _check_image(reader, image_id, images, turned)
        if masks:
            _check_masks(reader, refs, bad_masks)
        if progress:
            progress(done, len(refs_of))
    report.problems += _summary(images, "image", images_advice) + _summary(bad_masks, "mask", masks_advice)
    if turned.reasons:
        report.notes += _summary(turned, "image", "; pixels are used as stored, on which COCO's masks are drawn")
    return report


def _check_image(reader: Reader, image_id: int, found: Tally, turned: Tally) -> None:
    """Count what is wrong with an image, and whether viewers turn it."""
    try:
        path = reader.image_path(image_id)
        size, turn = picture_header(path)
        expected = reader.image_size(image_id)
    except FileNotFoundError as error:
        found.add("absent", str(error).removesuffix(PUT_THERE))
        return
    except (OSError, ValueError) as error:
        found.add("unreadable", str(error))
        return
    if turn != 1:
        turned.add("with an EXIF orientation other than 1", f"{path}: {turn}")
    if size != expected:
        sizes_from = getattr(reader, "instances_path", reader.source).name
        more = ""
        if turn >= 5 and size == expected[::-1]:
            more = (
                f"; its EXIF orientation is {turn}, and {sizes_from} seems to be of the picture turned "
                "upright: save the picture turned, without the tag"
            )
        found.add(
            "of another size",
            f"{path} is {size[0]}x{size[1]}, {sizes_from} says {expected[0]}x{expected[1]} (height x width){more}",
        )


def picture_header(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width as stored, and the EXIF orientation, from a picture's header; its end is looked at, too.

    Raises FileNotFoundError or ValueError if it is absent, unreadable, or of pixels that `as_rgb` refuses.
    """
    with opened(path) as picture:
        check_range(picture, f"image {path}")
        found = (picture.height, picture.width), orientation(picture)
        mark = _LAST_MARKS.get(picture.format or "")
    if mark and not _ends_with(path, mark):
        open_image(path)  # that takes long, and says what is wrong, if anything is
    return found


def _ends_with(path: Path, mark: bytes) -> bool:
    """Whether a file's last bytes hold a mark; some programs write a little behind it."""
    with path.open("rb") as file:
        file.seek(-min(_TAIL, path.stat().st_size), os.SEEK_END)
        return mark in file.read()


def _check_masks(reader: Reader, refs: list[Ref], found: Tally) -> None:
    for ref in refs:
        try:
            named = ref.ann_ids or any(sentence.exists for sentence in ref.sentences)
            if named and not reader.mask(ref).any():
                raise ValueError(f"ref_id {ref.ref_id}: its annotation covers no pixel of the image")
            reader.extra(ref, ref.sentences[0])
        except (OSError, ValueError) as error:
            found.add("unusable", str(error).removesuffix(PUT_THERE))


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


def _other_splits(reader: Refer) -> list[str]:
    """A sentence on splits whose names are not the field's: whoever asks for its own does not get them."""
    own = [split for split in reader.splits if split not in SPLITS]
    named = ", ".join(f"{split!r} ({len(reader.refs(split))} refs)" for split in own)
    return [f"{reader.source}: the field does not know split {named}; its names are {', '.join(SPLITS)}"] if own else []


def _summary(found: Tally, noun: str, advice: str) -> list[str]:
    told = []
    for state, count in found.reasons.items():
        if not count:
            continue
        first = found.examples[state]
        more = f"; and {count - len(first)} more" if count > len(first) else ""
        helps = advice or PUT_THERE * (state == "absent")
        told.append(f"{count} {noun}{'s' * (count != 1)} {state}: {'; '.join(first)}{more}{helps}")
    return told


def _advice(error: str, dataset: str) -> str:
    if "image folder" in error:
        return f"; COCO's train2014 images: {IMAGES_SOURCE}"
    return f"; the annotations of {dataset}: {SOURCES[dataset]}" if dataset in SOURCES else ""
