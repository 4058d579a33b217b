"""Own pictures, masks and sentences, in the formats that people have them in, to REFER's layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from magnet_fast.data.datasets.base import read_json
from magnet_fast.data.importing.coco import read_coco
from magnet_fast.data.importing.collecting import Collection, collect
from magnet_fast.data.importing.cvat import read_cvat
from magnet_fast.data.importing.folders import read_folders
from magnet_fast.data.importing.label_studio import read_label_studio
from magnet_fast.data.importing.record import Problems, Record
from magnet_fast.data.importing.table import read_drawings
from magnet_fast.data.importing.writing import REFS_NAME, SPLITS, assign_splits, records, write_folder

_EXPECTED = (
    "a table (.csv, .tsv, .jsonl), COCO's or Label Studio's .json, CVAT's .xml, or a folder with images and masks"
)


@dataclass(frozen=True)
class ImportReport:
    """What `import_data` did.

    Attributes:
        folder: of the files that were written.
        image_root: where the pictures are.
        counts: split -> (pictures, objects, sentences).
        several: sentences that name more than one object.
        left_out: what was wrong and is not in the data, each with where it stands.
    """

    folder: Path
    image_root: Path
    counts: dict[str, tuple[int, int, int]]
    several: int
    left_out: list[str] = field(default_factory=list)


class ImportProblemsError(ValueError):
    """Something cannot be imported; nothing is written.

    Attributes:
        problems: all of it, each with where it stands.
    """

    def __init__(self, source: Path, problems: list[str]) -> None:
        super().__init__("\n".join([f"{source}: expected data without a problem, got {len(problems)}", *problems]))
        self.problems = problems


def import_data(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    dataset: str = "own",
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write own data in REFER's layout: `<out>/<dataset>/instances.json` and `refs(unc).json`.

    Pictures stay where they are: instances.json says in which folder (`info.image_root`, below `out` or absolute), and
    `Refer` looks there, which works on every file system. Masks are taken into instances.json. All pictures, masks and
    sentences are looked at before anything is written, and both files appear at once.

    An object is one mask in one picture, however many rows speak of it. A sentence that stands with several objects of
    one picture names all of them, as in gRefCOCO.

    Args:
        source: a table (.csv, .tsv, .jsonl), COCO's instances (.json), Label Studio's export (.json), CVAT's for images
            (.xml), or a folder with images and masks; the submodules say what each holds.
        out: root of data sets; made where it does not exist.
        images: folder of the pictures; that of the source's file, or `images` in the source's folder, if None.
        dataset: name of the new folder below `out`; it must not exist.
        val, test: shares of the pictures for these splits. A picture is in one split with all that is said of it.
        seed: of the splits.
        skip_bad: leave out what cannot be used, in place of refusing all.
        progress: called with (records done, records in all).

    Raises:
        ImportProblemsError: records that cannot be used, without `skip_bad`; nothing is written.
        ValueError, OSError: an argument, or a source of which nothing can be read.
    """
    source, target = Path(source), _target(Path(out), dataset)
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; expected a share of the pictures, 0 to below 1")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    folder = Path(os.path.abspath(_image_folder(source, images)))
    problems = Problems()
    found = collect(list(_records(source, folder, problems)), folder, problems, progress)
    if problems and not skip_bad:
        raise ImportProblemsError(source, problems)
    if not found.annotations:
        place = "; in a folder: images/PICTURE.jpg and, for each object, masks/PICTURE__the_words.png"
        named = place if source.is_dir() else ""
        raise ValueError(f"{source}: expected at least one object that can be used, got none{named}")
    used = list(dict.fromkeys(one.picture for one in found.annotations))
    names = [found.pictures[place].name for place in used]
    splits = dict(zip(used, assign_splits(names, val, test, seed), strict=True))
    root = os.path.abspath(target.parent)
    image_root = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)
    instances, refs = records(found, splits, image_root, f"imported from {source.name}")
    write_folder(target, {"instances.json": instances, REFS_NAME: refs})
    return ImportReport(
        folder=target,
        image_root=folder,
        counts=_counts(found, splits),
        several=sum(len(named) > 1 for named in found.sentences.values()),
        left_out=list(problems),
    )


def _target(out: Path, dataset: str) -> Path:
    if not dataset or dataset in (".", "..") or "/" in dataset or not dataset.isprintable():
        raise ValueError(f"dataset is {dataset!r}; expected the name of a folder")
    if (out / dataset).exists():
        raise FileExistsError(f"{out / dataset} exists; expected a new folder: remove it, or give another --dataset")
    return out / dataset


def _image_folder(source: Path, images: str | os.PathLike[str] | None) -> Path:
    folder = Path(images) if images is not None else source / "images" if source.is_dir() else source.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"images is {str(folder)!r}; expected a folder of pictures that exists")
    return folder


def _records(source: Path, folder: Path, problems: Problems) -> Iterator[Record]:
    """The records of a source, its format told by its name and, of JSON, by what it holds."""
    ending = source.suffix.lower()
    if source.is_dir():
        return read_folders(source, folder, problems)
    if ending in (".csv", ".tsv", ".jsonl"):
        return read_drawings(source, problems)
    if ending == ".xml":
        return read_cvat(source, problems)
    if ending == ".json":
        content = read_json(source)
        if isinstance(content, dict) and "annotations" in content:
            return read_coco(source, content, problems)
        if isinstance(content, list):
            return read_label_studio(source, content, problems)
        raise ValueError(f"{source}: expected COCO's dict or Label Studio's list, got {type(content).__name__}")
    raise ValueError(f"{source}: expected {_EXPECTED}, got {ending or 'no ending'}")


def _counts(found: Collection, splits: dict[int, str]) -> dict[str, tuple[int, int, int]]:
    pictures = list(splits.values())
    objects = [splits[one.picture] for one in found.annotations]
    sentences = [splits[picture] for picture, _ in found.sentences]
    return {
        split: (pictures.count(split), objects.count(split), sentences.count(split))
        for split in SPLITS
        if split in pictures
    }
