"""The photographs of a data set with all their regions, from COCO's instances.json."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magnet_fast.data.datasets.base import read_json
from magnet_fast.data.datasets.reader import Reader
from magnet_fast.data.phrases.photograph import Photograph
from magnet_fast.data.segmentation import decode_segmentation, usable_parts
from magnet_fast.data.transforms import open_image
from magnet_fast.data.transforms.pictures import resize_nearest


class RegionReader:
    """All annotations of the images that a reader's split refers to.

    Args:
        reader: of REFER's layout, with `instances_path`.
        split: whose images are taken; those that another split refers to as well are left out.
        side: longest side that photographs are kept at, in pixels; larger ones are shrunk.
        cache: keep what was read in memory.

    Attributes:
        images: their ids, in order.
        names: classes of the data, in the order of their ids.
        countable: those of things.

    Raises:
        ValueError: a reader without instances.json, or an annotation of no known form; the message names it.
    """

    def __init__(self, reader: Reader, split: str, side: int, *, cache: bool) -> None:
        self.reader, self.side = reader, side
        path = getattr(reader, "instances_path", None)
        if path is None:
            raise ValueError(
                f"data.phrases: {reader.source} has no instances.json, whose regions sentences are made of"
            )
        self.path = Path(path)
        elsewhere = {ref.image_id for other in reader.splits if other != split for ref in reader.refs(other)}
        self.images = sorted({ref.image_id for ref in reader.refs(split)} - elsewhere)
        if not self.images:
            raise ValueError(f"data.phrases: {self.path} has no image that only the split {split!r} refers to")
        self._annotations, categories = _read(self.path, self.images)
        self.names = tuple(str(record["name"]) for record in categories)
        self.countable = tuple(
            name for name, record in zip(self.names, categories, strict=True) if record.get("isthing", 1)
        )
        self._category = {record["id"]: name for name, record in zip(self.names, categories, strict=True)}
        self._kept: dict[int, tuple[np.ndarray, np.ndarray, tuple[int, int, int], Any]] | None = None
        if cache:
            self._kept = {image: self._packed(self._load(image)) for image in self.images}

    def __len__(self) -> int:
        return len(self.images)

    def classes_of(self, place: int) -> list[str]:
        """The countable classes of a photograph, without looking at it."""
        found = {self._category.get(record.get("category_id")) for record in self._annotations[self.images[place]]}
        return sorted(found & set(self.countable))

    def photograph(self, place: int) -> Photograph:
        """The photograph at a place of `images`."""
        image = self.images[place]
        if self._kept is None:
            return self._load(image)
        photo, packed, shape = self._kept[image]
        masks = np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).view(bool)
        return Photograph(photo.pixels, masks, photo.names, photo.things, photo.crowds, photo.vague)

    @staticmethod
    def _packed(photo: Photograph) -> tuple[Photograph, np.ndarray, tuple[int, ...]]:
        packed, shape = np.packbits(photo.masks), photo.masks.shape
        return Photograph(photo.pixels, np.zeros((0, 1, 1), bool), *_labels(photo)), packed, shape

    def _load(self, image: int) -> Photograph:
        height, width = self.reader.image_size(image)
        scale = min(1.0, self.side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        picture = open_image(self.reader.image_path(image))
        if picture.size != (width, height):
            raise ValueError(
                f"{self.path}: image {image} has {width} x {height}; its file has {picture.width} x {picture.height}"
            )
        pixels = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0))
        masks, names, crowds = [], [], []
        for record in self._annotations[image]:
            try:
                mask = decode_segmentation(usable_parts(record.get("segmentation")), height, width)
            except ValueError as error:
                raise ValueError(f"{self.path}: annotation {record.get('id')} cannot be decoded: {error}") from error
            mask = resize_nearest(mask, size).astype(bool)
            name = self._category.get(record.get("category_id"))
            if mask.any() and name is not None:
                masks.append(mask)
                names.append(name)
                crowds.append(bool(record.get("iscrowd", 0)))
        stack = np.stack(masks) if masks else np.zeros((0, *size), dtype=bool)
        things = np.array([name in self.countable for name in names], dtype=bool)
        return Photograph(pixels, stack, tuple(names), things, np.array(crowds, dtype=bool), np.zeros(len(names), bool))


def _labels(photo: Photograph) -> tuple[Any, ...]:
    return photo.names, photo.things, photo.crowds, photo.vague


def _read(path: Path, images: Collection[int]) -> tuple[dict[int, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Annotations by image, and categories in the order of their ids."""
    content = read_json(path)
    found: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    for record in content["annotations"]:
        if isinstance(record, dict) and record.get("image_id") in found:
            found[record["image_id"]].append(record)
    categories = [
        record
        for record in content.get("categories") or []
        if isinstance(record, dict) and type(record.get("id")) is int and isinstance(record.get("name"), str)
    ]
    if not categories:
        raise ValueError(f"data.phrases: {path} names no categories, which sentences are made of")
    return found, sorted(categories, key=lambda record: record["id"])
