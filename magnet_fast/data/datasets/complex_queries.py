"""Reader of complex queries (RIS-CQ): long sentences about relations, things and stuff, masks in panoptic PNGs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from magnet_fast.data.datasets.base import (
    BaseReader,
    Folders,
    RecordError,
    begins_with,
    choose_folders,
    each_record,
    find_file,
    one_sentence,
    picture_size,
)
from magnet_fast.data.datasets.panoptic import read_segments, require_segment
from magnet_fast.data.datasets.reader import Ref, Sentence
from magnet_fast.data.datasets.scene_nodes import NODE_FILES, SceneNodes
from magnet_fast.data.values import require, require_inside, shown

SPLITS = ("train", "val", "test")
_DIGITS = 18  # of an image's number, which travels as int64
PLACES = (".", "images", "images/coco", "images/mscoco", "images/mscoco/images")  # in the data's folder and in the root


class ComplexQueries(BaseReader):
    """Sentences and the panoptic segments they name, checked as they are opened. A record is a ref with one sentence.

    A split is a JSON file of `<root>/<dataset>`, named by the file (`sub_ris.json` is what is released): a list of
    {file_name, sentence, pan_seg_file, id}, such as "train2017/000000417720.jpg" and
    "panoptic_train2017/000000417720.png". The mask is where red + 256 green + 65536 blue of COCO's panoptic PNG equals
    id. `Ref.ref_id` counts the records of all files, `Ref.image_id` is COCO's number, from the file's name.

    Where the folder holds nodes of a scene (see `SceneNodes`), `extra` gives them, and records whose image has none are
    left out and counted.

    Args:
        root, dataset: the folder is `<root>/<dataset>`.
        images: folder or folders that image names such as "train2017/..." are relative to; else `PLACES` in the folder
            and in `<root>`. Panoptic PNGs are looked for there, in `annotations` beside and in the data's own folder.

    Raises FileNotFoundError for absent files and folders; ValueError, naming file and record, for broken JSON, missing
    or wrong values, and names that give no COCO number, or one number to two images.
    """

    def __init__(self, root: str | os.PathLike[str], dataset: str = "ris_cq", *, images: Folders | None = None) -> None:
        root = Path(root)
        folder = root / dataset
        files = query_files(folder)
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no JSON file that is a list of {{file_name, sentence, pan_seg_file, id}}"
            )
        super().__init__(folder if len(files) > 1 else files[0], SPLITS)
        usual = [base / place for base in (folder, root) for place in PLACES]
        self._image_folders: list[Path] = []
        with self._file():
            self._image_folders = choose_folders(root, images, usual)
        places = [*self._image_folders, folder, root]
        self._panoptic_folders = [*places, *(place / "annotations" for place in places)]
        self._image_names: dict[int, str] = {}
        self._panoptic_names: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._nodes = None
        with self._file():
            self._nodes = SceneNodes.find(folder, self._panoptic_folders, self._record)
        self._count = 0
        for path in files:
            with self._file():
                self._read(path)
        self._close()

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width of the panoptic PNG, in pixels: the records do not say the image's."""
        if image_id not in self._sizes:
            self._sizes[image_id] = picture_size(self._panoptic_path(image_id))
        return self._sizes[image_id]

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError naming the folders where it was looked for."""
        self._check(image_id)
        return find_file(self._image_names[image_id], self._image_folders, "image")

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1.

        Raises FileNotFoundError for an absent PNG; ValueError for one that cannot be read, or without the segment.
        """
        path = self._panoptic_path(ref.image_id)
        mask = (read_segments(path) == ref.ann_ids[0]).astype(np.uint8)
        if not mask.any():
            raise ValueError(f"{self.source}: ref_id {ref.ref_id}: segment {ref.ann_ids[0]} is not in {path}")
        return mask

    def extra(self, ref: Ref, sentence: Sentence) -> dict[str, Tensor]:
        """The nodes of the image's scene where the folder holds them, as `SceneNodes.tensors` gives them."""
        return {} if self._nodes is None else self._nodes.tensors(self._image_names[ref.image_id])

    def _check(self, image_id: int) -> None:
        if image_id not in self._image_names:
            raise ValueError(f"image_id is {image_id!r}; {self.source} names {len(self._image_names)} others")

    def _panoptic_path(self, image_id: int) -> Path:
        self._check(image_id)
        return find_file(self._panoptic_names[image_id], self._panoptic_folders, "panoptic PNG")

    def _read(self, path: Path) -> None:
        for number, record in enumerate(each_record(path)):
            with self._record():
                self._parse(record, f"{path}: record {number}", path.stem)

    def _parse(self, record: Any, where: str, split: str) -> None:
        require(record, {"file_name": str, "sentence": str, "pan_seg_file": str, "id": int}, where)
        segment = require_segment(record["id"], where)
        image, panoptic = (require_inside(record[key], where) for key in ("file_name", "pan_seg_file"))
        image_id = self._image_id(image, panoptic, where)
        if self._nodes is not None and image not in self._nodes:
            self.skipped.add("no nodes for its image", f"{where}: {image}")
            return
        self._image_names[image_id], self._panoptic_names[image_id] = image, panoptic
        self._keep(
            Ref(
                ref_id=self._count,
                ann_ids=(segment,),
                image_id=image_id,
                category_id=None,
                split=split,
                sentences=one_sentence(self._count, record["sentence"]),
            )
        )
        self._count += 1

    def _image_id(self, image: str, panoptic: str, where: str) -> int:
        stem = Path(image).stem
        if not (stem.isascii() and stem.isdigit() and len(stem) <= _DIGITS):
            raise ValueError(f"{where} has file_name {shown(image)}; expected COCO's number, such as 000000417720.jpg")
        image_id = int(stem)
        known = (self._image_names.get(image_id, image), self._panoptic_names.get(image_id, panoptic))
        if known != (image, panoptic):
            raise RecordError(
                "number of another image",
                f"{where} names {image} and {panoptic}; a record before names {known[0]} and {known[1]}",
            )
        return image_id


def query_files(folder: Path) -> list[Path]:
    """JSON files of a folder that are lists of sentences, told by their first record."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name in NODE_FILES:
            continue
        first = next(each_record(path), None) if begins_with(path, "[") else None
        if isinstance(first, dict) and ("sentence" in first or "pan_seg_file" in first):
            found.append(path)
    return found
