"""Label Studio's export "JSON": brushes, polygons and rectangles with a text or a label."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from magnet_fast.data.importing.drawings import box, is_number
from magnet_fast.data.importing.record import Drawing, Problems, Record, require_list
from magnet_fast.data.segmentation import MAX_CHARACTERS
from magnet_fast.data.values import require_size, shown

_SHAPES = ("polygon", "rectangle", "brush")
_UNREAD = ("ellipse", "keypoint", "vector", "bitmask", "video")  # shapes, too, but of no mask that is known here
_HASH = 8  # characters that an upload's name gets in front, with a hyphen
_CHANNELS = 4  # a brush is stored as a picture of red, green, blue and opacity


def read_label_studio(path: Path, content: list[Any], problems: Problems) -> Iterator[Record]:
    """The regions of an export. Texts of a region (<TextArea perRegion="true">) are its sentences.

    Of a task with several annotations the one marked as ground truth is used. Predictions and cancelled annotations are
    left out, and so is what draws nothing (choices, ratings, relations).

    Args:
        path: of the file, for messages.
        content: what it holds.
        problems: of single tasks and regions; gathered while records are taken.
    """
    for number, task in enumerate(content):
        where = f"task {task['id'] if isinstance(task, dict) and isinstance(task.get('id'), int) else f'({number})'}"
        with problems.at(where):
            if not isinstance(task, dict) or not isinstance(task.get("data"), dict) or "annotations" not in task:
                raise ValueError(f"it is {shown(task)}; expected data and annotations, as the export 'JSON' has them")
            names = image_names(task["data"])
            for region_id, results in _regions(task).items():
                at = f"{where}, region {shown(region_id)}"
                with problems.at(at):
                    yield _record(at, names, results)


def image_names(data: dict[str, Any]) -> tuple[str, ...]:
    """Names under which a task's picture may lie in a folder, from its address in Label Studio.

    Raises ValueError where no entry is a picture's address, or several are.
    """
    Image.init()
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    found = [value for value in texts.values() if PurePosixPath(_path_of(value)).suffix.lower() in Image.EXTENSION]
    address = texts["image"] if "image" in texts else found[0] if len(found) == 1 else None
    if not address:
        raise ValueError(f"data is {shown(data)}; expected one entry with the address of a picture")
    local = _path_of(address)
    name = PurePosixPath(local).name
    names = [local.lstrip("/"), name]
    if "/upload/" in local and name[_HASH : _HASH + 1] == "-":
        names.append(name[_HASH + 1 :])
    return tuple(dict.fromkeys(names))


def brush(packed: list[Any]) -> Drawing:
    """A brush's mask, where its picture is not transparent: bytes of thi.ng's rle-pack.

    A header of 32 bits with the number of values, 5 with the bits of one, less 1, and four times 4 with the bits of a
    count, less 1. Then for each group a bit that says whether one value is repeated, 2 that choose the bits of the
    count, the count less 1, and the value, or as many as counted. The highest bit comes first.
    """
    if len(packed) > MAX_CHARACTERS or not all(type(one) is int and 0 <= one < 256 for one in packed):
        raise ValueError(f"rle is {shown(packed)}; expected at most {MAX_CHARACTERS} bytes, each 0 to 255")
    bits = _Bits(bytes(packed))

    def draw(height: int, width: int) -> np.ndarray:
        bits.place = 0
        count, value_bits = bits.take(32), bits.take(5) + 1
        sizes = [bits.take(4) + 1 for _ in range(4)]
        if count != height * width * _CHANNELS or value_bits != 8:
            raise ValueError(
                f"rle has {count} values of {value_bits} bits; expected {height * width * _CHANNELS} of 8, "
                f"{_CHANNELS} for each pixel of the picture"
            )
        values = np.zeros(count, dtype=np.uint8)
        done = 0
        while done < count:
            repeated, length = bits.take(1), bits.take(sizes[bits.take(2)]) + 1
            if length > count - done:
                raise ValueError(f"rle has more than {count} values; expected as many as its header says")
            if repeated:
                values[done : done + length] = bits.take(8)
            else:
                values[done : done + length] = np.frombuffer(bits.take(8 * length).to_bytes(length, "big"), np.uint8)
            done += length
        return values.reshape(height, width, _CHANNELS)[..., -1] > 0

    return draw


class _Bits:
    """Bytes read bit by bit."""

    def __init__(self, content: bytes) -> None:
        self._content, self.place = content, 0

    def take(self, count: int) -> int:
        """The next bits as a number; ValueError where there are not as many."""
        end = self.place + count
        if end > 8 * len(self._content):
            raise ValueError(f"rle has {len(self._content)} bytes, too few for its values; expected a whole one")
        number = int.from_bytes(self._content[self.place // 8 : -(-end // 8)], "big")
        self.place = end
        return (number >> (-end % 8)) & ((1 << count) - 1)


def _regions(task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Results by their region's id, which a region's shape, labels and texts share."""
    several = [one for one in require_list(task["annotations"], "annotations") if isinstance(one, dict)]
    several = [one for one in several if not one.get("was_cancelled")]
    chosen = [one for one in several if one.get("ground_truth")] or several
    if len(chosen) > 1:
        raise ValueError(f"annotations has {len(chosen)} that may be meant; expected one, or one as ground truth")
    found: dict[str, list[dict[str, Any]]] = {}
    for number, result in enumerate(require_list(chosen[0].get("result"), "result") if chosen else []):
        if not isinstance(result, dict) or not isinstance(result.get("type"), str):
            raise ValueError(f"result holds {shown(result)}; expected dicts with a type")
        if isinstance(result.get("value"), dict) and _is_of_region(result):
            found.setdefault(str(result.get("id", f"({number})")), []).append(result)
    return found


def _is_of_region(result: dict[str, Any]) -> bool:
    return result["type"].startswith((*_SHAPES, *_UNREAD, "textarea", "labels"))


def _record(where: str, names: tuple[str, ...], results: list[dict[str, Any]]) -> Record:
    shape = next((one for one in results if one["type"].startswith(_SHAPES)), None)
    if shape is None:
        kinds = ", ".join(one["type"] for one in results)
        raise ValueError(f"region is {kinds}; expected a polygon, a rectangle or a brush (texts: perRegion)")
    if shape.get("image_rotation"):
        raise ValueError(f"image_rotation is {shown(shape['image_rotation'])}; expected pictures that were not turned")
    said = {"height": shape.get("original_height"), "width": shape.get("original_width")}
    unsaid = all(side is None for side in said.values())  # of regions that a program made
    size = None if unsaid else require_size(said, "it")
    texts = [text for one in results if one["type"] == "textarea" for text in _listed(one["value"].get("text"))]
    keys = {key for one in results for key in (one["type"], "labels")}
    labels = [text for one in results for key in sorted(keys) for text in _listed(one["value"].get(key))]
    label = next((one for one in labels if isinstance(one, str)), None)
    return Record(where, names, _drawing(shape), tuple(texts), label, size)


def _drawing(shape: dict[str, Any]) -> Drawing:
    value = shape["value"]
    if shape["type"].startswith("brush"):
        if value.get("format") != "rle":
            raise ValueError(f"format is {shown(value.get('format'))}; expected 'rle'")
        return brush(require_list(value.get("rle"), "rle"))
    if shape["type"].startswith("polygon"):
        points = require_list(value.get("points"), "points")
        pairs = [point for point in points if isinstance(point, list) and len(point) == 2]
        if len(pairs) < len(points) or not all(map(is_number, chain.from_iterable(pairs))):
            raise ValueError(f"points is {shown(points)}; expected [[x, y], ...]")
        return lambda height, width: [[part for x, y in pairs for part in (x * width / 100, y * height / 100)]]
    corner = [value.get(key) for key in ("x", "y", "width", "height")]
    if not all(map(is_number, corner)):
        raise ValueError(f"value is {shown(value)}; expected x, y, width and height")
    box(corner, value.get("rotation") or 0)  # told before the picture is looked at

    def draw(height: int, width: int) -> list | np.ndarray:
        scaled = [share * side / 100 for share, side in zip(corner, (width, height) * 2, strict=True)]
        return box(scaled, value.get("rotation") or 0)(height, width)

    return draw


def _path_of(address: str) -> str:
    """The path in an address of Label Studio's: of a file that it serves from disk, an upload, a web or cloud one."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address
    served = parse_qs(parts.query).get("d") if parts.path.endswith("/local-files/") else None
    if served:
        return served[0]
    return unquote(parts.path) if parts.scheme or parts.query or parts.path.startswith("/data/upload/") else address


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
