"""Records to pictures, annotations and refs; everything is looked at here, before anything is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from magnet_fast.data.check import picture_header
from magnet_fast.data.importing.record import Problems, Record
from magnet_fast.data.segmentation import bounding_box, decode_segmentation, encode_mask, usable_parts
from magnet_fast.data.values import require_inside, shown

SLACK = 2  # pixels by which an outline may slip over the picture's edge [our choice]
LONGEST = 500  # characters of a sentence [our choice]; models read some twenty words
UNLABELLED = "object"  # the category of what has no label


@dataclass(frozen=True)
class Picture:
    """A picture as it is on disk: its path below the folder of pictures, height and width in pixels."""

    name: str
    height: int
    width: int
    turn: int


@dataclass(frozen=True)
class Annotation:
    """An object: its picture's place in the list, COCO's segmentation, area and box [x, y, width, height] in pixels."""

    picture: int
    segmentation: list | dict
    area: int
    bbox: list[int]
    category: str


@dataclass
class Collection:
    """What is to be written.

    Attributes:
        pictures: each once, however many records speak of it.
        annotations: each object once: same picture, same mask.
        sentences: (place of the picture, sentence) -> places of the annotations that it names.
    """

    pictures: list[Picture] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    sentences: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def refs(self) -> list[tuple[int, tuple[int, ...], list[str]]]:
        """Picture, annotations and sentences of each ref: sentences that name the same are of one."""
        found: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        for (picture, sentence), named in self.sentences.items():
            found.setdefault((picture, tuple(sorted(named))), []).append(sentence)
        return [(picture, named, sentences) for (picture, named), sentences in found.items()]


def collect(
    records: Sequence[Record], folder: Path, problems: Problems, progress: Callable[[int, int], None] | None = None
) -> Collection:
    """Everything that records say, as far as it can be used; the rest is in `problems`.

    A sentence that stands with several objects of one picture names all of them. Where no record has a sentence, the
    labels are the sentences.

    Args:
        records: of one source.
        folder: of the pictures.
        progress: called with (records done, records in all).
    """
    collector = _Collector(folder, problems, spoken=any(record.sentences for record in records))
    for done, record in enumerate(records, start=1):
        collector.add(record)
        if progress:
            progress(done, len(records))
    return collector.found


class _Collector:
    def __init__(self, folder: Path, problems: Problems, spoken: bool) -> None:
        self.found = Collection()
        self._folder, self._problems, self._spoken = folder, problems, spoken
        self._looked_up: dict[tuple[str, ...], int | OSError | ValueError] = {}
        self._places: dict[Path, int] = {}
        self._objects: dict[tuple[int, bytes], int] = {}
        self._first: dict[tuple[int, str, int], str] = {}  # where a sentence was said of an object

    def add(self, record: Record) -> None:
        """A record whose picture, sentences and mask are all usable; each of them is looked at in any case."""
        before = len(self._problems)
        place, sentences = None, []
        with self._problems.at(record.where):
            place = self._picture(record)
        for one in self._said(record):
            with self._problems.at(record.where):
                sentences.append(clean(one))
        if place is None:
            return
        with self._problems.at(record.where):
            segmentation, mask = draw(record, self.found.pictures[place])
            if len(self._problems) == before:
                self._keep(record, place, segmentation, mask, sentences)

    def _said(self, record: Record) -> Sequence[Any]:
        if record.sentences or self._spoken:
            return record.sentences or (None,)
        return (None if record.label is None else record.label.replace("_", " "),)

    def _picture(self, record: Record) -> int:
        if record.names not in self._looked_up:
            try:
                self._looked_up[record.names] = self._open(record.names)
            except (OSError, ValueError) as error:
                self._looked_up[record.names] = error
        place = self._looked_up[record.names]
        if isinstance(place, Exception):
            raise place
        picture = self.found.pictures[place]
        _check_size(record.size, picture)
        return place

    def _open(self, names: tuple[str, ...]) -> int:
        name = _find(names, self._folder)
        path = self._folder / name
        real = path.resolve()  # one picture under two names must not be in two splits
        if real not in self._places:
            (height, width), turn = picture_header(path)
            self._places[real] = len(self.found.pictures)
            self.found.pictures.append(Picture(name, height, width, turn))
        return self._places[real]

    def _keep(self, record: Record, place: int, segmentation: Any, mask: np.ndarray, sentences: list[str]) -> None:
        key = place, hashlib.sha256(np.packbits(mask)).digest()
        number = self._objects.get(key, len(self.found.annotations))
        for sentence in dict.fromkeys(sentences):
            first = self._first.get((place, sentence, number))
            if first is not None:
                raise ValueError(f"sentence is {sentence!r}, which {first} says of the same object; expected it once")
        if key not in self._objects:
            self._objects[key] = number
            self.found.annotations.append(_annotation(place, segmentation, mask, record.label))
        for sentence in dict.fromkeys(sentences):
            self._first[place, sentence, number] = record.where
            self.found.sentences.setdefault((place, sentence), []).append(number)


def clean(text: Any) -> str:
    """A sentence with single spaces; ValueError for what has no word, or far too many."""
    if not isinstance(text, str) or not any(map(str.isalnum, text)):
        raise ValueError(f"sentence is {shown(text)}; expected words")
    words = " ".join(text.split())
    if len(words) > LONGEST:
        raise ValueError(f"sentence has {len(words)} characters; expected at most {LONGEST}: {shown(words)}")
    return words


def draw(record: Record, picture: Picture) -> tuple[list | dict, np.ndarray]:
    """A record's segmentation as it is written, and its mask (H, W) of bool; ValueError where it cannot be used."""
    size = picture.height, picture.width
    drawn = record.draw(*size)
    if isinstance(drawn, np.ndarray):
        mask, segmentation = drawn, encode_mask(drawn)
    else:
        parts = usable_parts(drawn)
        mask = decode_segmentation(parts, *size) != 0
        _check_outline([value for part in parts if isinstance(part, list) for value in part[::2]], "x", size[1])
        _check_outline([value for part in parts if isinstance(part, list) for value in part[1::2]], "y", size[0])
        segmentation = parts[0] if isinstance(parts[0], dict) and len(parts) == 1 else parts
    if not mask.any():
        raise ValueError("mask is empty; expected at least one pixel of the picture")
    return segmentation, mask


def _check_outline(values: list[float], axis: str, side: int) -> None:
    if not values:
        return
    low, high = min(values), max(values)
    if low < -SLACK or high > side + SLACK:
        raise ValueError(f"outline reaches from {low:g} to {high:g} in {axis}; expected 0 to {side}, the picture's")
    if low >= 0 and high <= 1 and any(value != int(value) for value in values):
        raise ValueError(f"outline reaches from {low:g} to {high:g} in {axis}; expected pixels, not shares of the side")


def _check_size(said: tuple[int, int] | None, picture: Picture) -> None:
    size = picture.height, picture.width
    turned = picture.turn >= 5 and size[0] != size[1]  # height and width change places
    if picture.turn != 1 and not (turned and said == size):
        raise ValueError(
            f"image {picture.name!r} is shown turned (EXIF orientation {picture.turn}) and read as stored; "
            "expected one that is stored upright: save it turned, without the tag"
        )
    if said is not None and said != size:
        raise ValueError(
            f"size is {said[0]} x {said[1]} (height x width); expected {size[0]} x {size[1]}, that of {picture.name!r}"
        )


def _find(names: Sequence[str], folder: Path) -> str:
    """The first of the names, relative to the folder, under which there is a file, there or in `images` below."""
    for one in names:
        if os.path.isabs(one) and Path(one).is_relative_to(folder):
            one = Path(one).relative_to(folder).as_posix()
        inside = require_inside(one, "it")
        for name in (inside, inside.replace("\\", "/")):  # as Windows writes it
            for below in (name, f"images/{name}"):
                if (folder / below).exists():
                    return Path(below).as_posix()
    raise ValueError(f"image is {names[0]!r}; expected a picture in {folder}: --images names another folder")


def _annotation(picture: int, segmentation: list | dict, mask: np.ndarray, label: str | None) -> Annotation:
    return Annotation(picture, segmentation, int(mask.sum()), bounding_box(mask), label or UNLABELLED)
