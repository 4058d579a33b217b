"""CVAT's export "CVAT for images 1.1": polygons, boxes and masks, with sentences in attributes, or with labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from magnet_fast.data.importing.drawings import box, outline, runs_in_rows
from magnet_fast.data.importing.record import SENTENCE_KEYS, Drawing, Problems, Record
from magnet_fast.data.values import require_size, shown, whole

_NUMBER = re.compile(r"[+-]?(\d{1,18}\.?\d{0,18}|\.\d{1,18})(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
_TYPE = "<!DOCTYPE"
_BESIDE = ("tag",)  # of the whole picture, drawing nothing


def read_cvat(path: Path, problems: Problems) -> Iterator[Record]:
    """The shapes of an export, an element each. An attribute that is called as in `SENTENCE_KEYS` is a sentence.

    Args:
        path: of annotations.xml.
        problems: of single pictures and shapes; gathered while records are taken.

    Raises ValueError for what is no such export, and for a document type: only it could make a small file large.
    """
    for picture, element in enumerate(_images(path)):
        name = element.get("name", "")
        where = f"image {shown(name) if name else f'({picture})'}"
        with problems.at(where):
            size = require_size(dict(element.attrib), "it")
            for number, shape in enumerate(one for one in element if one.tag not in _BESIDE):
                at = f"{where}, shape {number + 1}"
                with problems.at(at):
                    yield Record(at, (name,), _drawing(shape), _sentences(shape), shape.get("label"), size)


def _images(path: Path) -> list[ElementTree.Element]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected XML in UTF-8, got other bytes ({error})") from error
    # A parser that meets entities goes on to expand them, even where it is told to stop; without a document type there
    # are none. As it is given text, not bytes, no declared encoding can hide one.
    if _TYPE in text:
        raise ValueError(f"{path}: expected XML without a document type, as every export is, got {_TYPE}")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: expected XML, got something else ({error})") from error
    if root.tag != "annotations" or root.find("track") is not None:
        found = "<track>, of a video" if root.tag == "annotations" else f"<{root.tag:.40}>"
        raise ValueError(f"{path}: expected the export 'CVAT for images 1.1', got {found}")
    return root.findall("image")


def _drawing(shape: ElementTree.Element) -> Drawing:
    if shape.tag == "polygon":
        points = [point.split(",") for point in shape.get("points", "").split(";")]
        if not all(len(point) == 2 for point in points):
            raise ValueError(f"points is {shown(shape.get('points'))}; expected x,y;x,y;...")
        return outline([[_number(value, "points") for point in points for value in point]])
    if shape.tag == "box":
        left, top, right, bottom = (_number(shape.get(key), key) for key in ("xtl", "ytl", "xbr", "ybr"))
        degrees = _number(shape.get("rotation", "0"), "rotation")
        return box([left, top, right - left, bottom - top], degrees, pivot="centre")
    if shape.tag == "mask":
        box_of = {key: whole(shape.get(key)) for key in ("left", "top", "width", "height")}
        if None in box_of.values():
            raise ValueError(f"mask is {shown(box_of)}; expected whole numbers")
        return runs_in_rows(shape.get("rle", ""), **box_of)
    raise ValueError(f"shape is a {shape.tag:.40}; expected a polygon, a box or a mask")


def _sentences(shape: ElementTree.Element) -> tuple[str, ...]:
    return tuple(
        one.text
        for one in shape.findall("attribute")
        if one.get("name", "").strip().lower() in SENTENCE_KEYS and one.text
    )


def _number(text: str | None, key: str) -> float:
    if text is None or not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{key} is {shown(text)}; expected a number")
    return float(text)
