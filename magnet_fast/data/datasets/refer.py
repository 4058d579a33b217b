"""Reader of REFER's layout: RefCLEF, RefCOCO, RefCOCO+, G-Ref, gRefCOCO, R-RefCOCO, embedded scenes and own data."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from magnet_fast.data.datasets.base import BaseReader, Folders, choose_folders, read_json
from magnet_fast.data.datasets.reader import Ref, Sentence
from magnet_fast.data.safe_pickle import load_plain_pickle
from magnet_fast.data.segmentation import decode_segmentation, draw_segmentation

IMAGE_FOLDERS = (
    "images/mscoco/images/train2014",  # LAVT's
    "images/mscoco/train2014",  # RefSegformer's
    "images/train2014",
    "images/saiapr_tc-12",  # RefCLEF's, in REFER's layout
)
"""Where the field keeps images, below the root. `images` itself and the folders in it follow."""

SPLITS = ("train", "val", "test", "testA", "testB", "testC")
"""The field's splits in their customary order; data may name others."""

NO_TARGET = -1  # gRefCOCO's ann_id of a ref without target


class Refer(BaseReader):
    """A data set in REFER's layout, checked as it is opened.

    Reads `<root>/<dataset>/instances.json` and `refs(<split_by>).p` (or `.json`; gRefCOCO: `grefs(<split_by>)`),
    pickles only as far as they hold plain data. An image file is looked at only when it is used.

    gRefCOCO: `ann_id` may be a list, whose masks are merged; [-1] is no target, and its sentences do not exist.
    Annotations with `iscrowd` are left out, as in the released reader; a ref with nothing else is left out with them
    [our choice]. R-RefCOCO: a sentence's `exist` (bool or 0/1, absent = true) says whether it names anything.

    Args:
        root: folder of data sets and images.
        dataset: the data set's folder below.
        split_by: whose splits, as in the name of the refs file.
        images: folder or folders of images, absolute or below the root; default the field's (`IMAGE_FOLDERS`), then
            `images` and the folders in it, as far as they hold files.

    Attributes:
        source: the refs file.
        categories: id -> name.

    Raises:
        FileNotFoundError: absent files and folders.
        ValueError: broken JSON, refs that name an image or annotation that instances.json does not hold, annotations
            without a polygon; named are file and record.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        dataset: str = "refcoco",
        split_by: str = "unc",
        *,
        images: Folders | None = None,
    ) -> None:
        self.root, self.dataset, self.split_by = Path(root), dataset, split_by
        folder = self.root / dataset
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; expected a folder with instances.json and refs")
        super().__init__(_find_refs(folder, split_by), SPLITS)
        self.instances_path = folder / "instances.json"
        self._image_folders = _image_folders(self.root, images)
        instances = _read_instances(self.instances_path)
        self._images = _by_id(instances, "images", self.instances_path)
        self.categories: dict[int, str] = {
            key: record.get("name", "") for key, record in _by_id(instances, "categories", self.instances_path).items()
        }
        annotations = _by_id(instances, "annotations", self.instances_path)
        records = load_plain_pickle(self.source) if self.source.suffix == ".p" else read_json(self.source)
        if not isinstance(records, list) or not records:
            raise ValueError(f"{self.source}: holds {type(records).__name__}; expected a list of refs, not empty")
        self._without_crowds = self.source.name.startswith("grefs")
        for position, record in enumerate(records):
            ref = self._parse(position, record, annotations)
            if ref is not None:
                self._keep(ref)
        used = {ann_id for refs in self._refs.values() for ref in refs for ann_id in ref.ann_ids}
        self._annotations = {ann_id: annotations[ann_id] for ann_id in used}  # COCO's others would fill memory
        self._close()

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width that instances.json gives, in pixels."""
        record = self._image(image_id)
        return record["height"], record["width"]

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError if no image folder holds it."""
        name = self._image(image_id)["file_name"]
        for folder in self._image_folders:
            if (folder / name).is_file():
                return folder / name
        looked = " nor ".join(str(folder) for folder in self._image_folders)
        raise FileNotFoundError(f"image {name} (image_id {image_id}) of {self.instances_path} is not in {looked}")

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1: the union of the ref's annotations.

        Empty for a ref without target, and for a sentence that does not exist.
        """
        return self._union(ref, sentence, self.image_size(ref.image_id), decode_segmentation)

    def mask_at(self, ref: Ref, sentence: Sentence | None, size: tuple[int, int]) -> np.ndarray:
        """Ground truth uint8 (h, w) drawn at another size than the image's, from polygons scaled to it: ReLA's way.

        A few pixels at borders differ from those of `mask`, resized.
        """
        return self._union(ref, sentence, size, partial(draw_segmentation, size=size))

    def _union(
        self, ref: Ref, sentence: Sentence | None, size: tuple[int, int], decode: Callable[..., np.ndarray]
    ) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        if sentence is not None and not sentence.exists:
            return mask
        for ann_id in ref.ann_ids:
            try:
                mask |= decode(_usable(self._annotations[ann_id]["segmentation"]), *self.image_size(ref.image_id))
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"{self.instances_path}: annotation {ann_id} cannot be decoded: {error}") from error
        return mask

    def _image(self, image_id: int) -> dict:
        if image_id not in self._images:
            raise ValueError(f"image_id is {image_id!r}; {self.instances_path} does not hold it")
        return self._images[image_id]

    def _parse(self, position: int, record: Any, annotations: dict[int, dict]) -> Ref | None:
        """A ref; None for one that is left out."""
        name = self.source.name
        if not isinstance(record, dict):
            raise ValueError(f"{name}: record {position} is a {type(record).__name__}; expected a dict")
        missing = [key for key in ("ref_id", "ann_id", "image_id", "split", "sentences") if key not in record]
        where = f"{name}: ref_id {record.get('ref_id', f'(record {position})')}"
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        for key in ("ref_id", "image_id"):  # they travel in tensors
            if not isinstance(record[key], int) or isinstance(record[key], bool):
                raise ValueError(f"{where} has {key} {record[key]!r:.80}; expected an int")
        image_id, split = record["image_id"], record["split"]
        if image_id not in self._images:
            raise ValueError(f"{where} names image_id {image_id}, which instances.json does not hold")
        if not isinstance(split, str) or not split.strip():
            raise ValueError(f"{where} names split {split!r}; expected text")
        ann_ids = _as_tuple(record["ann_id"])
        targets = tuple(one for one in ann_ids if one != NO_TARGET)
        if len(targets) not in (0, len(ann_ids)):
            raise ValueError(f"{where} has ann_id {list(ann_ids)}; expected annotations, or [-1] alone for no target")
        for one in targets:
            if one not in annotations:
                raise ValueError(f"{where} names ann_id {one}, which instances.json does not hold")
            if not _has_region(annotations[one].get("segmentation")):
                raise ValueError(f"{self.instances_path}: annotation {one} ({where}) has no polygon and no RLE")
        sentences = record["sentences"]
        if not isinstance(sentences, (list, tuple)) or not sentences:
            raise ValueError(f"{where} has no sentences")
        named = bool(targets)
        if named and self._without_crowds:
            targets = tuple(one for one in targets if not annotations[one].get("iscrowd"))
            if not targets:
                self._skip("its annotations are all crowds", f"ref_id {record['ref_id']}")
                return None
        return Ref(
            ref_id=record["ref_id"],
            ann_ids=targets,
            image_id=image_id,
            category_id=_category(record.get("category_id")),
            split=split,
            sentences=tuple(_parse_sentence(one, where, named) for one in sentences),
        )


def _find_refs(folder: Path, split_by: str) -> Path:
    names = [f"{stem}({split_by}){suffix}" for stem in ("refs", "grefs") for suffix in (".p", ".json")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")


def _image_folders(root: Path, images: Folders | None) -> list[Path]:
    """Those given, else those of the field that exist, `images` and the folders in it."""
    if images is not None:
        return choose_folders(root, images, ())
    found = [root / name for name in IMAGE_FOLDERS if (root / name).is_dir()]
    above = root / "images"
    if above.is_dir():
        own = [above, *sorted(entry for entry in above.iterdir() if entry.is_dir())]
        found += [folder for folder in own if folder not in found and _holds_files(folder)]
    if not found:
        looked = " nor ".join(str(root / name) for name in (*IMAGE_FOLDERS, "images"))
        raise FileNotFoundError(f"no image folder: neither {looked} exists and holds files; name it by images=")
    return found


def _holds_files(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_file() for entry in entries)


def _read_instances(path: Path) -> dict:
    content = read_json(path)
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


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _category(value: Any) -> int | None:
    """One category; None where there is none, and where a ref's targets are of several."""
    different = set(_as_tuple(value)) - {None, NO_TARGET}
    return different.pop() if len(different) == 1 else None


def _parse_sentence(record: Any, where: str, named: bool) -> Sentence:
    """A sentence; `named` says whether its ref has a target."""
    if not isinstance(record, dict) or "sent_id" not in record or not ("raw" in record or "sent" in record):
        raise ValueError(f"{where}: sentence {record!r:.200} lacks sent_id or raw")
    exist = record.get("exist", True)
    if exist not in (True, False):  # 1 and 0, too
        raise ValueError(f"{where}: sent_id {record['sent_id']} has exist {exist!r:.80}; expected true or false")
    sent = record.get("sent", record.get("raw"))
    return Sentence(
        sent_id=record["sent_id"],
        raw=record.get("raw", sent),
        sent=sent,
        tokens=tuple(record.get("tokens", ())),
        kind=record.get("kind"),
        exists=named and bool(exist),
    )


def _has_region(segmentation: Any) -> bool:
    """Whether there is something to decode, as far as can be told at a glance."""
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts")) and bool(segmentation.get("size"))
    if not isinstance(segmentation, list):
        return False
    return any(_has_region(part) if isinstance(part, dict) else _is_polygon(part) for part in segmentation)


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _usable(segmentation: Any) -> Any:
    """A segmentation without its degenerate polygons, which the field's readers leave out."""
    if not isinstance(segmentation, list):
        return segmentation
    return [part for part in segmentation if not isinstance(part, list) or _is_polygon(part)]
