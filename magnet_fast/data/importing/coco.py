"""COCO's instances.json, with sentences in its annotations or with the names of its categories for sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from magnet_fast.data.importing.drawings import box, outline
from magnet_fast.data.importing.record import SENTENCE_KEYS, Drawing, Problems, Record, as_texts, require_list
from magnet_fast.data.values import require, require_id, require_size, shown


class _Image(NamedTuple):
    file_name: str
    size: tuple[int, int]


def read_coco(path: Path, content: dict[str, Any], problems: Problems) -> Iterator[Record]:
    """The annotations of a file that holds COCO's `images`, `annotations` and, maybe, `categories`.

    An annotation's sentences stand under any of `SENTENCE_KEYS`, each a text or a list of texts, or so among its
    `attributes`, where CVAT and datumaro put what was written beside a shape.

    Args:
        path: of the file, for messages.
        content: what it holds.
        problems: of single records; gathered while records are taken.

    Raises ValueError where a list is not there.
    """
    lists = {key: require_list(content.get(key), f"{path}: {key}") for key in ("images", "annotations")}
    images = dict(_by_id(lists["images"], "image", problems))
    pictures: dict[int, _Image] = {}
    for image_id, record in images.items():
        with problems.at(f"image {image_id}"):
            require(record, {"file_name": str}, "it")
            pictures[image_id] = _Image(record["file_name"], require_size(record, "it"))
    labels = {
        record.get("id"): record.get("name")
        for record in require_list(content.get("categories", []), f"{path}: categories")
        if isinstance(record, dict) and isinstance(record.get("name"), str) and isinstance(record.get("id"), int)
    }
    for ann_id, annotation in _by_id(lists["annotations"], "annotation", problems):
        where = f"annotation {ann_id}"
        with problems.at(where):
            image_id = require_id(annotation.get("image_id"), "image_id", "it")
            if image_id in images and image_id not in pictures:
                raise ValueError(f"image_id is {image_id}; expected an image without a problem of its own")
            if image_id not in images:
                raise ValueError(f"image_id is {image_id}; expected the id of one of the file's images")
            image = pictures[image_id]
            label = annotation.get("category_id")
            yield Record(
                where,
                (image.file_name,),
                _drawing(annotation),
                _sentences(annotation),
                labels.get(label) if isinstance(label, int) else None,
                image.size,
            )


def _sentences(annotation: dict[str, Any]) -> tuple[Any, ...]:
    beside = annotation.get("attributes")
    named = beside.items() if isinstance(beside, dict) else ()
    values = [annotation.get(key) for key in SENTENCE_KEYS]
    values += [value for key, value in named if key.strip().lower() in SENTENCE_KEYS and value != ""]  # left blank
    return tuple(text for value in values for text in as_texts(value))


def _drawing(annotation: dict[str, Any]) -> Drawing:
    if annotation.get("segmentation"):
        return outline(annotation["segmentation"])
    corner = annotation.get("bbox")
    if not isinstance(corner, list) or len(corner) != 4:
        raise ValueError(f"bbox is {shown(corner)}; expected [x, y, width, height], there being no segmentation")
    return box(corner)


def _by_id(records: list[Any], kind: str, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records that are dicts with an id, each id once."""
    taken: dict[int, int] = {}
    for number, record in enumerate(records):
        with problems.at(f"{kind} record {number}"):
            require(record, {"id": object}, "it")
            one = require_id(record["id"], "id", "it")
            if one in taken:
                raise ValueError(f"id is {one}, that of record {taken[one]}, too; expected each id once")
            taken[one] = number
            yield one, record
