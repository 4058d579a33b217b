"""Reader of REFER's layout: RefCOCO, RefCOCO+, G-Ref, gRefCOCO and embedded scenes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magnet_fast.data.safe_pickle import load_plain_pickle

IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/mscoco/train2014")  # LAVT's and RefSegformer's
SPLITS = ("train", "val", "test", "testA", "testB", "testC")
NO_TARGET = -1  # gRefCOCO's ann_id of a ref without referent


@dataclass(frozen=True)
class Sentence:
    """One expression. `raw` is as its author typed it, `sent` cleaned; `kind` is set in embedded scenes."""

    sent_id: int
    raw: str
    sent: str
    tokens: tuple[str, ...]
    kind: str | None = None


@dataclass(frozen=True)
class Ref:
    """A referent and its sentences. `ann_ids`: none for a ref without target, several for their union."""

    ref_id: int
    ann_ids: tuple[int, ...]
    image_id: int
    category_id: int | None
    split: str
    sentences: tuple[Sentence, ...]


class Refer:
    """A dataset in REFER's layout, checked as it is opened.

    Reads `<root>/<dataset>/instances.json` and `refs(<split_by>).p` (or `.json`; gRefCOCO:
    `grefs(<split_by>)`), pickles only as far as they hold plain data. Images are looked for in both of the
    field's folders; an image file is looked at only when it is used.

    Raises FileNotFoundError for absent files; ValueError, naming file and record, for broken JSON, refs that
    name an image or annotation that instances.json does not hold, unknown splits and annotations without a
    polygon.
    """

    def __init__(self, root: str | os.PathLike[str], dataset: str = "refcoco", split_by: str = "unc") -> None:
        self.root, self.dataset, self.split_by = Path(root), dataset, split_by
        folder = self.root / dataset
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; expected a folder with instances.json and refs")
        self.refs_path = _find_refs(folder, split_by)
        self.instances_path = folder / "instances.json"
        self._image_folders = [self.root / name for name in IMAGE_FOLDERS if (self.root / name).is_dir()]
        if not self._image_folders:
            looked = " nor ".join(str(self.root / name) for name in IMAGE_FOLDERS)
            raise FileNotFoundError(f"no image folder: neither {looked} exists")
        instances = _read_instances(self.instances_path)
        self._images = _by_id(instances, "images", self.instances_path)
        self.categories: dict[int, str] = {
            key: record.get("name", "") for key, record in _by_id(instances, "categories", self.instances_path).items()
        }
        annotations = _by_id(instances, "annotations", self.instances_path)
        records = load_plain_pickle(self.refs_path) if self.refs_path.suffix == ".p" else _read_json(self.refs_path)
        if not isinstance(records, list) or not records:
            raise ValueError(f"{self.refs_path}: holds {type(records).__name__}; expected a list of refs, not empty")
        self._refs = [self._parse(position, record, annotations) for position, record in enumerate(records)]
        used = {ann_id for ref in self._refs for ann_id in ref.ann_ids}
        self._annotations = {ann_id: annotations[ann_id] for ann_id in used}  # COCO's others would fill memory

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the refs name, in the customary order."""
        present = {ref.split for ref in self._refs}
        return tuple(split for split in SPLITS if split in present)

    def refs(self, split: str) -> list[Ref]:
        """The refs of one split in file order. Raises ValueError for a split that the file does not name."""
        found = [ref for ref in self._refs if ref.split == split]
        if not found:
            raise ValueError(
                f"split is {split!r}; {self.refs_path.name} of {self.dataset} has {', '.join(self.splits)}"
            )
        return found

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width that instances.json gives, in pixels."""
        record = self._image(image_id)
        return record["height"], record["width"]

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError if neither image folder holds it."""
        name = self._image(image_id)["file_name"]
        for folder in self._image_folders:
            if (folder / name).is_file():
                return folder / name
        looked = " nor ".join(str(folder) for folder in self._image_folders)
        raise FileNotFoundError(f"image {name} (image_id {image_id}) of {self.instances_path} is not in {looked}")

    def mask(self, ref: Ref) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1: the union of the ref's annotations, empty without target."""
        height, width = self.image_size(ref.image_id)
        mask = np.zeros((height, width), dtype=np.uint8)
        for ann_id in ref.ann_ids:
            try:
                part = _decode(self._annotations[ann_id]["segmentation"], height, width)
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"{self.instances_path}: annotation {ann_id} cannot be decoded: {error}") from error
            if part.shape != mask.shape:
                raise ValueError(
                    f"{self.instances_path}: annotation {ann_id} decodes to {part.shape}, image {mask.shape}"
                )
            mask |= part
        return mask

    def _image(self, image_id: int) -> dict:
        if image_id not in self._images:
            raise ValueError(f"image_id is {image_id!r}; {self.instances_path} does not hold it")
        return self._images[image_id]

    def _parse(self, position: int, record: Any, annotations: dict[int, dict]) -> Ref:
        name = self.refs_path.name
        if not isinstance(record, dict):
            raise ValueError(f"{name}: record {position} is a {type(record).__name__}; expected a dict")
        missing = [key for key in ("ref_id", "ann_id", "image_id", "split", "sentences") if key not in record]
        where = f"{name}: ref_id {record.get('ref_id', f'(record {position})')}"
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        image_id, split = record["image_id"], record["split"]
        if image_id not in self._images:
            raise ValueError(f"{where} names image_id {image_id}, which instances.json does not hold")
        if split not in SPLITS:
            raise ValueError(f"{where} names split {split!r}; expected one of {', '.join(SPLITS)}")
        ann_id = record["ann_id"]
        ann_ids = tuple(one for one in (ann_id if isinstance(ann_id, (list, tuple)) else (ann_id,)) if one != NO_TARGET)
        for one in ann_ids:
            if one not in annotations:
                raise ValueError(f"{where} names ann_id {one}, which instances.json does not hold")
            if not _has_region(annotations[one].get("segmentation")):
                raise ValueError(f"{self.instances_path}: annotation {one} ({where}) has no polygon and no RLE")
        sentences = record["sentences"]
        if not isinstance(sentences, (list, tuple)) or not sentences:
            raise ValueError(f"{where} has no sentences")
        return Ref(
            ref_id=record["ref_id"],
            ann_ids=ann_ids,
            image_id=image_id,
            category_id=record.get("category_id"),
            split=split,
            sentences=tuple(_parse_sentence(one, where) for one in sentences),
        )


def _find_refs(folder: Path, split_by: str) -> Path:
    names = [f"{stem}({split_by}){suffix}" for stem in ("refs", "grefs") for suffix in (".p", ".json")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _read_instances(path: Path) -> dict:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected COCO's dict of images and annotations")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{path}: lacks the list {key!r}; expected COCO's images, annotations and categories")
    for image in content["images"]:
        if not isinstance(image, dict) or not {"id", "file_name", "height", "width"} <= image.keys():
            raise ValueError(f"{path}: image record {image!r:.200} lacks one of id, file_name, height, width")
    return content


def _by_id(content: dict, key: str, path: Path) -> dict[int, dict]:
    try:
        return {record["id"]: record for record in content[key]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a record of {key!r} has no id") from error


def _parse_sentence(record: Any, where: str) -> Sentence:
    if not isinstance(record, dict) or "sent_id" not in record or not ("raw" in record or "sent" in record):
        raise ValueError(f"{where}: sentence {record!r:.200} lacks sent_id or raw")
    sent = record.get("sent", record.get("raw"))
    return Sentence(
        sent_id=record["sent_id"],
        raw=record.get("raw", sent),
        sent=sent,
        tokens=tuple(record.get("tokens", ())),
        kind=record.get("kind"),
    )


def _has_region(segmentation: Any) -> bool:
    """Whether a segmentation can be decoded, told without pycocotools."""
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts")) and bool(segmentation.get("size"))
    if not isinstance(segmentation, list):
        return False
    return any(_has_region(part) if isinstance(part, dict) else _is_polygon(part) for part in segmentation)


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons, RLE (compressed or not) or list of RLEs -> uint8 (H, W) of 0 and 1."""
    try:
        from pycocotools import mask as coco_mask  # not needed, and maybe absent, where no mask is decoded
    except ImportError as error:
        raise ImportError("masks of REFER annotations need pycocotools: pip install pycocotools") from error

    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    rles = [part for part in parts if isinstance(part, dict)]
    packed = [coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle for rle in rles]
    polygons = [part for part in parts if not isinstance(part, dict) and _is_polygon(part)]
    if polygons:
        packed += coco_mask.frPyObjects(polygons, height, width)
    return coco_mask.decode(coco_mask.merge(packed))
