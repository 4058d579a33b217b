"""Small sources of own data for the tests of imports: pictures, and writers of objects in each format."""

from __future__ import annotations

import csv
import json
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from magnet_fast.data.datasets import open_reader

Masks = dict[tuple[str, str], np.ndarray]
"""(picture's name, sentence) -> mask (H, W) of bool."""


class Object(NamedTuple):
    """A mask of a picture, and a sentence."""

    name: str
    mask: np.ndarray
    sentence: str


def draw_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Pictures of noise, by name and size (H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def box_mask(size: tuple[int, int], x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def save_mask(mask: np.ndarray, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return str(path)


def expected(objects: list[Object]) -> Masks:
    """What a reader must give: the union of the masks that a sentence has in a picture."""
    found: Masks = {}
    for one in objects:
        key = one.name, one.sentence
        found[key] = found[key] | one.mask if key in found else one.mask
    return found


def read(out: Path, dataset: str = "own") -> Masks:
    """What the package's reader finds, over all splits."""
    reader = open_reader(out, dataset)
    return {
        (reader.image_path(ref.image_id).name, sentence.raw): reader.mask(ref, sentence).astype(bool)
        for split in reader.splits
        for ref in reader.refs(split)
        for sentence in ref.sentences
    }


def same(found: Masks, wanted: Masks) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted)


# ---- a writer for each format: objects into a folder that has their pictures; what to import ----


def write_csv(folder: Path, objects: list[Object], delimiter: str = ",") -> Path:
    path = folder / ("data.tsv" if delimiter == "\t" else "data.csv")
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["sentence", "notes", "image", "mask"])
        for number, one in enumerate(objects):
            save_mask(one.mask, folder / "masks" / f"{number}.png")
            rows.writerow([one.sentence, "a, b", one.name, f"masks/{number}.png"])
    return path


def write_tsv(folder: Path, objects: list[Object]) -> Path:
    return write_csv(folder, objects, "\t")


def write_jsonl(folder: Path, objects: list[Object]) -> Path:
    path = folder / "data.jsonl"
    rows = [{"image": one.name, "sentence": one.sentence, "rle": packed(one.mask)} for one in objects]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_coco(folder: Path, objects: list[Object]) -> Path:
    sizes = {one.name: one.mask.shape for one in objects}
    ids = {name: number for number, name in enumerate(sizes, 5)}
    content = {
        "images": [
            {"id": ids[name], "file_name": name, "height": size[0], "width": size[1]} for name, size in sizes.items()
        ],
        "annotations": [
            {"id": number, "image_id": ids[one.name], "caption": one.sentence, "segmentation": packed(one.mask)}
            for number, one in enumerate(objects)
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def write_label_studio(folder: Path, objects: list[Object]) -> Path:
    tasks = []
    for name in dict.fromkeys(one.name for one in objects):
        results: list[dict[str, Any]] = []
        for number, one in enumerate(one for one in objects if one.name == name):
            size = {"original_width": one.mask.shape[1], "original_height": one.mask.shape[0]}
            value = {"format": "rle", "rle": brushed(one.mask), "brushlabels": ["thing"]}
            results.append({"id": f"r{number}", "type": "brushlabels", "image_rotation": 0, "value": value, **size})
            results.append({"id": f"r{number}", "type": "textarea", "value": {"text": [one.sentence]}, **size})
        data = {"image": f"/data/upload/3/0123abcd-{name}"}
        tasks.append({"id": len(tasks), "data": data, "annotations": [{"id": 1, "result": results}]})
    path = folder / "export.json"
    path.write_text(json.dumps(tasks))
    return path


def write_cvat(folder: Path, objects: list[Object]) -> Path:
    root = ElementTree.Element("annotations")
    for name in dict.fromkeys(one.name for one in objects):
        mine = [one for one in objects if one.name == name]
        height, width = mine[0].mask.shape
        image = ElementTree.SubElement(root, "image", name=name, width=str(width), height=str(height))
        for one in mine:
            rows, columns = np.flatnonzero(one.mask.any(axis=1)), np.flatnonzero(one.mask.any(axis=0))
            inner = one.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            box = {"left": columns[0], "top": rows[0], "width": inner.shape[1], "height": inner.shape[0]}
            runs = ", ".join(map(str, runs_of(inner.ravel().tolist())))
            shape = ElementTree.SubElement(image, "mask", rle=runs, **{key: str(value) for key, value in box.items()})
            ElementTree.SubElement(shape, "attribute", name="Sentence").text = one.sentence
    path = folder / "annotations.xml"
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    return path


def packed(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def runs_of(pixels: list[bool]) -> list[int]:
    """Lengths of zeros and ones in turn, zeros first."""
    runs = [len(list(group)) for _, group in groupby(pixels)]
    return [0, *runs] if pixels[0] else runs


def brushed(mask: np.ndarray) -> list[int]:
    """A mask as Label Studio's bytes, by a string of bits: runs of four and more repeated, others value by value."""
    values = np.repeat(mask.ravel().astype(int) * 255, 4).tolist()
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    for value, group in groupby(values):
        length = len(list(group))
        while length:
            taken = min(length, 1 << 16)
            kind = next(one for one, size in enumerate((3, 4, 8, 16)) if taken <= 1 << size)
            count = f"{taken - 1:0{(3, 4, 8, 16)[kind]}b}"
            repeated = taken != 4
            bits += f"{repeated:d}{kind:02b}{count}" + f"{value:08b}" * (1 if repeated else taken)
            length -= taken
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]
