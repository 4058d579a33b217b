"""Reader of PhraseCut (VGPhraseCut_v0): phrases on Visual Genome's images, one or several regions each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from magnet_fast.data.datasets.base import (
    BaseReader,
    Folders,
    RecordError,
    choose_folders,
    each_record,
    find_file,
    one_sentence,
)
from magnet_fast.data.datasets.reader import Ref, Sentence
from magnet_fast.data.segmentation import check_points, join_points
from magnet_fast.data.values import require, require_id, require_size, shown

IMAGE_RECORDS = ("image_data_split.json", "image_data_split3000.json")  # by the loader's name, by the page's
SPLITS = ("train", "val", "miniv", "test")


class PhraseCut(BaseReader):
    """PhraseCut, checked as it is opened. A phrase is a ref with one sentence.

    Reads `<root>/<dataset>/image_data_split.json` (a list of {image_id, width, height, ...}) and every
    `refer_<split>.json` beside it, a list of {task_id, image_id, phrase, Polygons, phrase_structure, ...}. Polygons are
    nested as instance, polygon, point [x, y]. The file's name gives the split; `miniv` are 100 images that `val` leaves
    out. `refer_input_<split>.json` have no regions and are not read.

    Masks are drawn as PhraseCut's own loader draws them, because its scores are counted on these: points truncated to
    whole pixels, the outline part of the region (half a pixel wider on each side than COCO's drawing), all instances
    united. `Ref.ref_id` counts phrases and `Ref.ann_ids` instances in file order: task_id is no number, and PhraseCut's
    ann_ids are Visual Genome's objects, which are not one to one with what was drawn. `Sentence.kind` is what makes the
    phrase unique: "name", "attribute" or "relation"; "verbose" says more than is needed.

    Left out and counted: polygons of fewer than two points, as by PhraseCut's loader; phrases without any other; a
    task_id that occurred before, which PhraseCut's authors mean to have removed.

    Args:
        root, dataset: the folder is `<root>/<dataset>`.
        images: folder or folders of `<image_id>.jpg`; else `images` in the folder and Visual Genome's `VG_100K` and
            `VG_100K_2`, in the folder, in `<root>` and in `<root>/images`.

    Raises FileNotFoundError for absent files and folders; ValueError, naming file and record, for broken JSON, missing
    or wrong values, images that the list of images does not hold, and ids that it gives to several.
    """

    def __init__(
        self, root: str | os.PathLike[str], dataset: str = "VGPhraseCut_v0", *, images: Folders | None = None
    ) -> None:
        root = Path(root)
        folder = root / dataset
        files = split_files(folder)
        records = next((folder / name for name in IMAGE_RECORDS if (folder / name).is_file()), None)
        if records is None or not files:
            raise FileNotFoundError(f"{folder} lacks {' or '.join(IMAGE_RECORDS)}, or any refer_<split>.json")
        super().__init__(folder if len(files) > 1 else next(iter(files.values())), SPLITS)
        places = [base / name for base in (folder, root, root / "images") for name in ("VG_100K", "VG_100K_2")]
        self._image_folders: list[Path] = []
        with self._file():
            self._image_folders = choose_folders(root, images, [folder / "images", *places])
        self._sizes: dict[int, tuple[int, int]] = {}
        with self._file():
            self._read_sizes(records)
        self._image_records = records
        self.task_ids: list[str] = []
        """PhraseCut's name of each ref, by ref_id: what its evaluation names prediction files by."""
        self._polygons: list[list[np.ndarray]] = []  # of each ref, whole pixels (N, 2)
        self._instances = 0
        for split in sorted(files, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)):
            with self._file():
                self._read(files[split], split)
        self._close()

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width that the list of images gives, in pixels."""
        if image_id not in self._sizes:
            raise ValueError(f"image_id is {image_id!r}; {self._image_records} does not hold it")
        return self._sizes[image_id]

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError naming the folders where it was looked for."""
        return find_file(f"{image_id}.jpg", self._image_folders, "image")

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1: all instances of the phrase, outlines included."""
        height, width = self.image_size(ref.image_id)
        canvas = Image.new("L", (width, height), 0)
        draw = ImageDraw.Draw(canvas)
        for polygon in self._polygons[ref.ref_id]:
            draw.polygon(polygon.ravel().tolist(), outline=1, fill=1)
        return np.array(canvas)

    def _read(self, path: Path, split: str) -> None:
        known = set(self.task_ids)
        for number, record in enumerate(each_record(path)):
            with self._record():
                self._parse(record, _where(path, "task_id", record, number), split, known)

    def _parse(self, record: Any, where: str, split: str, known: set[str]) -> None:
        require(record, {"task_id": str, "image_id": object, "phrase": str, "Polygons": list}, where)
        task_id, image_id = record["task_id"], require_id(record["image_id"], "image_id", where)
        if image_id not in self._sizes:
            raise RecordError(
                "absent image",
                f"{where} names image_id {image_id}, which {self._image_records.name} does not hold",
            )
        instances = self._parse_polygons(record["Polygons"], *self._sizes[image_id], where)
        if task_id in known:
            self.skipped.add("task_id occurred before", where)
            return
        known.add(task_id)
        if not instances:
            self.skipped.add("no polygon", where)
            return
        ref_id, last = len(self.task_ids), self._instances + len(instances)
        self._keep(
            Ref(
                ref_id=ref_id,
                ann_ids=tuple(range(self._instances, last)),
                image_id=image_id,
                category_id=None,
                split=split,
                sentences=one_sentence(ref_id, record["phrase"], _kind(record, where)),
            )
        )
        self.task_ids.append(task_id)
        self._polygons.append([polygon for instance in instances for polygon in instance])
        self._instances = last

    def _parse_polygons(self, instances: list, height: int, width: int, where: str) -> list[list[np.ndarray]]:
        parsed = []
        for instance in instances:
            if not isinstance(instance, list):
                raise ValueError(f"{where}: Polygons hold {shown(instance)}; expected a list of polygons per instance")
            drawn = []
            for polygon in instance:
                joined = join_points(polygon) if isinstance(polygon, list) else None
                if joined is None:
                    raise ValueError(f"{where}: Polygons hold {shown(polygon)}; expected a polygon's points [x, y]")
                try:
                    points = check_points(joined, height, width)
                except ValueError as error:
                    raise ValueError(f"{where}: Polygons: {error}") from error
                if len(polygon) < 2:
                    self.skipped.add("polygon of fewer than two points", where)
                else:
                    drawn.append(points.astype(np.int32))  # towards 0, as int() does in PhraseCut's loader
            if drawn:
                parsed.append(drawn)
        return parsed

    def _read_sizes(self, path: Path) -> None:
        broken = set()
        for number, record in enumerate(each_record(path)):
            with self._record():
                where = _where(path, "image_id", record, number)
                require(record, {}, where)
                image_id, size = require_id(record.get("image_id"), "image_id", where), require_size(record, where)
                if self._sizes.setdefault(image_id, size) != size:
                    broken.add(image_id)
                    raise RecordError("id that stands twice", f"{where} stands twice, with other sizes")
        for image_id in broken:
            del self._sizes[image_id]


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file of phrases with regions."""
    paths = {path.stem.removeprefix("refer_"): path for path in sorted(folder.glob("refer_*.json"))}
    return {split: path for split, path in paths.items() if not split.startswith("input_")}


def _where(path: Path, key: str, record: Any, number: int) -> str:
    name = record.get(key) if isinstance(record, dict) else None
    plain = isinstance(name, str) and name.isprintable() and len(name) < 60
    return f"{path}: {key} {name if plain else f'(record {number})' if name is None else shown(name)}"


def _kind(record: dict[str, Any], where: str) -> str | None:
    structure = record.get("phrase_structure") or {}
    kind = structure.get("type") if isinstance(structure, dict) else structure
    if not isinstance(structure, dict) or not isinstance(kind, (str, type(None))):
        raise ValueError(f"{where}: phrase_structure is {shown(structure)}; expected a dict whose type is text")
    return kind
