"""COCO's instances.json: images, annotations and categories by id, each record's values looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from magnet_fast.data.datasets.base import RecordError, read_json
from magnet_fast.data.datasets.reader import Tally
from magnet_fast.data.segmentation import usable_parts
from magnet_fast.data.values import require, require_id, require_inside, require_size, shown, whole


class Picture(NamedTuple):
    """An image as the file describes it, sizes in pixels."""

    file_name: str
    height: int
    width: int


class Instances:
    """Images and annotations, looked up by id; one that is broken is an error only where something names it.

    An id that stands twice with the same contents is left out once; with different contents neither is used: which one
    was meant cannot be told.

    Args:
        path: of instances.json.
        skipped, doubtful: where to count what is left out, and what is odd.

    Attributes:
        images: those that can be used.
        categories: id -> name; empty where the file has none.
        image_root: folder of the images, absolute or below the data's root, that an import has noted
            (`info.image_root`, no field of COCO's); None where the file notes none.

    Raises FileNotFoundError, or ValueError for what is no JSON or lacks a list.
    """

    def __init__(self, path: Path, skipped: Tally, doubtful: Tally) -> None:
        self._name, self._skipped, self._doubtful = path.name, skipped, doubtful
        content = read_json(path, unique=True)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds {shown(content)}; expected COCO's dict of images and annotations")
        for key in ("images", "annotations"):
            if not isinstance(content.get(key), list):
                raise ValueError(f"{path}: lacks the list {key!r}; expected COCO's images and annotations")
        self._faults: dict[tuple[str, Any], str] = {}  # what is wrong, by kind and id
        self._named: set[tuple[str, Any]] = set()  # faults that are told, because something names them
        self.images: dict[int, Picture] = {}
        for image_id, record in self._by_id(content["images"], "image").items():
            where = f"{path.name}: image {image_id}"
            try:
                name = require_inside(record.get("file_name"), where)
                picture = Picture(name, *require_size(record, where))
            except ValueError as error:
                self._faults["image", image_id] = str(error)
                continue
            self.images[image_id] = picture
            if type(record["height"]) is not int or type(record["width"]) is not int:
                said = f"{where} has height {shown(record['height'])} and width {shown(record['width'])}"
                doubtful.add("a size not written as a whole number, read as one", said)
        info = content.get("info")
        root = info.get("image_root") if isinstance(info, dict) else None
        self.image_root = root if isinstance(root, str) and root else None
        self._annotations = self._by_id(content["annotations"], "annotation")
        self.categories = dict(self._categories(content.get("categories")))

    def require_image(self, image_id: int, where: str) -> None:
        """RecordError unless there is a usable image of this id; `where` says who asks."""
        if image_id not in self.images:
            self._refuse("image", image_id, where)

    def require_annotation(self, ann_id: int, image_id: int, where: str) -> dict[str, Any]:
        """The annotation of this id; RecordError unless it is one, and belongs to the image."""
        if ("annotation", ann_id) in self._faults or ann_id not in self._annotations:
            self._refuse("annotation", ann_id, where)
        annotation = self._annotations[ann_id]
        of = annotation.get("image_id", image_id)
        if type(of) is bool or of != image_id:
            cure = "; write ids without quotes in both files" if of == str(image_id) else ""
            raise RecordError(
                "annotation of another image",
                f"{where} of image_id {image_id} names ann_id {ann_id}; {self._name} says image_id {shown(of)} of it"
                f"{cure}",
            )
        return annotation

    def parts(self, ann_id: int, annotation: dict[str, Any]) -> list[list | dict]:
        """What `usable_parts` makes of its segmentation; RecordError where that is of no known form."""
        try:
            return usable_parts(annotation.get("segmentation"))
        except ValueError as error:
            raise RecordError(
                "broken annotation", f"{self._name}: annotation {ann_id} cannot be decoded: {error}"
            ) from error

    def is_crowd(self, ann_id: int, annotation: dict[str, Any]) -> bool:
        """COCO's `iscrowd`: 0 or 1, or absent."""
        value = annotation.get("iscrowd")
        number = int(value) if isinstance(value, bool) else 0 if value is None else whole(value)
        if number not in (0, 1):
            raise RecordError(
                "broken annotation",
                f"{self._name}: annotation {ann_id} has iscrowd {shown(value)}; expected 0 or 1",
            )
        return bool(number)

    def close(self) -> None:
        """Count the faults of what nothing names: they do no harm, and may be part of one that does."""
        for key, fault in self._faults.items():
            if key not in self._named:
                self._doubtful.add("broken, but no ref names it", fault)
        self._faults, self._annotations = {}, {}  # COCO's others would fill memory

    def _refuse(self, kind: str, one: int, where: str) -> None:
        if (kind, one) in self._faults:
            again = (kind, one) in self._named
            self._named.add((kind, one))
            said = f"{where} names {kind} {one}, see above" if again else f"{self._faults[kind, one]} ({where})"
            raise RecordError(f"broken {kind}", said)
        key = "ann_id" if kind == "annotation" else "image_id"
        reason = f"which {self._name} does not hold"
        if (kind, str(one)) in self._faults:
            self._named.add((kind, str(one)))
            reason = f"which {self._name} holds as the text '{one}'; write ids without quotes in both files"
        raise RecordError(f"absent {kind}", f"{where} names {key} {one}, {reason}")

    def _by_id(self, records: list[Any], kind: str) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for number, record in enumerate(records):
            where = f"{self._name}: {kind} record {number}"
            try:
                require(record, {}, where)
                one = require_id(record.get("id"), "id", where)
            except ValueError as error:
                text = record.get("id") if isinstance(record, dict) else None
                self._faults[kind, text if isinstance(text, str) else (number,)] = str(error)
                continue
            if one not in found:
                found[one] = record
            elif record == found[one]:
                self._skipped.add("the same record once more", f"{self._name}: {kind} id {one}")
            else:
                self._faults[kind, one] = f"{self._name}: {kind} id {one} stands more than once, with other contents"
        return {one: record for one, record in found.items() if (kind, one) not in self._faults}

    def _categories(self, records: Any) -> Iterator[tuple[int, str]]:
        found: dict[int, Any] = {}
        for number, record in enumerate(records if isinstance(records, list) else []):
            one = whole(record.get("id")) if isinstance(record, dict) else None
            name = record.get("name", "") if isinstance(record, dict) else None
            if one is None or not isinstance(name, str):
                self._doubtful.add(
                    "category without id or name", f"{self._name}: category record {number} is {shown(record)}"
                )
            elif found.setdefault(one, name) != name:
                self._doubtful.add(
                    "id that stands twice",
                    f"{self._name}: category id {one} is {shown(found[one])} and {shown(name)}; the first is used",
                )
            else:
                yield one, name
