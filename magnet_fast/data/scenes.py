"""Embedded scenes: drawn pictures with expressions that need reading, written in REFER's layout.

`write_scenes` needs no download: the pictures, their exact masks and the sentences come from a seed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from magnet_fast.data.polygons import mask_to_polygons
from magnet_fast.data.scene_drawing import SHAPES, Scene, draw_scene
from magnet_fast.data.scene_expressions import Expression
from magnet_fast.data.scene_generation import LEVELS, random_scene
from magnet_fast.data.scene_search import ExpressionSearch

FORMAT = "magnet_fast.scenes/1"
_MANIFEST = "scenes.json"
_IMAGE_FOLDER = Path("images/mscoco/images/train2014")
_JPEG_QUALITY = 92
_MINIMUM_VISIBLE = 0.62  # of an object's own pixels
_CHUNK = 50  # images per piece of work
# Chances with which a kind is tried first. Not every scene has an order or a relation to offer, so these are
# set such that the sentences written come out near 35 % attribute, 25 % place, 15 % order, 25 % relation.
_KIND_CHANCES = {
    "easy": {"attribute": 0.8, "place": 0.2},
    "hard": {"attribute": 0.62, "place": 0.15, "order": 0.08, "relation": 0.15},
}


@dataclass(frozen=True)
class Referent:
    """An object that is referred to and its one to three expressions."""

    index: int
    expressions: tuple[Expression, ...]


@dataclass(frozen=True)
class DescribedScene:
    """A scene, its picture uint8 (S, S, 3), visible masks bool (N, S, S) and two to four referents."""

    scene: Scene
    picture: np.ndarray
    masks: np.ndarray
    referents: tuple[Referent, ...]


def write_scenes(
    out: str | os.PathLike[str],
    images: int,
    seed: int,
    level: str = "easy",
    image_size: int = 128,
    *,
    workers: int = 1,
    progress: bool | None = None,
) -> Path:
    """Write `images` scenes in REFER's layout under `out` and return `out`.

    Written: refcoco/instances.json, refcoco/refs(unc).p (a plain pickle of dicts and lists; sentences carry
    the extra key "kind"), images/mscoco/images/train2014/COCO_train2014_*.jpg and scenes.json, which holds
    the arguments. The same arguments give the same bytes (with the same versions of NumPy and Pillow),
    whatever `workers` (processes) is.

    level "easy": 2-4 objects, kinds attribute and place. "hard": 5-10 objects, kinds attribute, place, order
    and relation. Splits are by image: val 10 %, testA 5 % (attribute sentences only), testB 5 % (relation
    sentences only; place for "easy"), the rest train; each at least one image.

    `progress`: show a progress bar; None shows it on an interactive terminal only.

    Raises ValueError for arguments out of range and FileExistsError if `out` holds anything but scenes of
    these same arguments, which are kept as they are. The folder appears under its name only once complete.
    """
    _check_arguments(images, seed, level, image_size, workers)
    out = Path(out)
    target = out.resolve()  # renaming onto a link would replace the link
    manifest = {"format": FORMAT, "images": images, "seed": seed, "level": level, "image_size": image_size}
    if _already_written(target, manifest):
        return out
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (partial / _IMAGE_FOLDER).mkdir(parents=True)
        _write_all(partial, manifest, workers, progress)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, target)  # absent or an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def describe_scene(seed: int, number: int, level: str, split: str, image_size: int = 128) -> DescribedScene:
    """Scene `number` of `write_scenes(..., seed, level, image_size)` when that image falls into `split`."""
    rng = random.Random(f"magnet_fast scene {seed} {number} {level}")
    chances = _kind_chances(level, split)
    while True:
        scene = random_scene(rng, level)
        referents = _choose_referents(scene, rng, chances)
        if referents is None:
            continue
        picture, masks, shown = draw_scene(scene, image_size)
        if shown.min() >= _MINIMUM_VISIBLE:
            return DescribedScene(scene, picture, masks, referents)


def assign_splits(images: int, seed: int) -> list[str]:
    """Split of each image: 80 % train, 10 % val, 5 % testA, 5 % testB, at least one image each."""
    counts = {"val": max(1, round(0.1 * images)), "testA": max(1, round(0.05 * images))}
    counts["testB"] = counts["testA"]
    splits = [split for split, count in counts.items() for _ in range(count)]
    splits += ["train"] * (images - len(splits))
    random.Random(f"magnet_fast splits {seed}").shuffle(splits)
    return splits


def _check_arguments(images: int, seed: int, level: str, image_size: int, workers: int) -> None:
    for name, value, least in (
        ("images", images, 4),
        ("seed", seed, 0),
        ("image_size", image_size, 64),
        ("workers", workers, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected an int")
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")


def _already_written(out: Path, manifest: dict) -> bool:
    """Whether `out` holds these very scenes. Raises FileExistsError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _MANIFEST).read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{out} exists and holds no embedded scenes; expected an empty or absent folder"
        ) from None
    if found == manifest:
        return True
    raise FileExistsError(f"{out} holds other scenes: {found}; asked for {manifest}. Name another folder")


def _write_all(root: Path, manifest: dict, workers: int, progress: bool | None) -> None:
    images = manifest["images"]
    splits = assign_splits(images, manifest["seed"])
    jobs = [
        (
            root,
            manifest["seed"],
            manifest["level"],
            manifest["image_size"],
            start,
            splits[start : start + _CHUNK],
        )
        for start in range(0, images, _CHUNK)
    ]
    records: list[dict] = []
    with contextlib.ExitStack() as stack:
        if workers > 1:
            # fork: a spawned worker would run the caller's script again. Workers touch NumPy and Pillow only.
            context = multiprocessing.get_context("fork")
            pool = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context))
            results = pool.map(_write_images, jobs)
        else:
            results = map(_write_images, jobs)
        for chunk in _tracked(results, len(jobs), progress):
            records += chunk
    _write_annotations(root, manifest, records)


def _tracked(results: Iterator[list[dict]], total: int, progress: bool | None) -> Iterator[list[dict]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if progress is None:
        progress = console.is_terminal
    return track(results, "Drawing scenes", total=total, console=console) if progress else results


def _write_images(job: tuple[Path, int, str, int, int, list[str]]) -> list[dict]:
    """Draw and write one piece's images; returns what the annotation files need of each."""
    root, seed, level, image_size, start, splits = job
    records = []
    for number, split in enumerate(splits, start):
        described = describe_scene(seed, number, level, split, image_size)
        file_name = f"COCO_train2014_{number + 1:012d}.jpg"
        Image.fromarray(described.picture).save(root / _IMAGE_FOLDER / file_name, quality=_JPEG_QUALITY, subsampling=0)
        records.append(
            {
                "file_name": file_name,
                "split": split,
                "objects": [
                    _object_record(item, mask)
                    for item, mask in zip(described.scene.objects, described.masks, strict=True)
                ],
                "referents": [
                    (referent.index, [(one.kind, one.text) for one in referent.expressions])
                    for referent in described.referents
                ],
            }
        )
    return records


def _object_record(item, mask: np.ndarray) -> dict:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "segmentation": mask_to_polygons(mask),
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "category_id": SHAPES.index(item.shape) + 1,
        "attributes": {
            "shape": item.shape,
            "colour": item.colour,
            "size": item.size,
            "texture": item.texture,
        },
    }


def _write_annotations(root: Path, manifest: dict, records: list[dict]) -> None:
    """instances.json, refs(unc).p and, last, the manifest. Ids count from 1 in image order."""
    size = manifest["image_size"]
    images, annotations, refs, sentence_id = [], [], [], 0
    for image_id, record in enumerate(records, 1):
        images.append({"id": image_id, "file_name": record["file_name"], "height": size, "width": size})
        first = len(annotations) + 1
        for offset, item in enumerate(record["objects"]):
            annotations.append({"id": first + offset, "image_id": image_id, "iscrowd": 0, **item})
        for index, expressions in record["referents"]:
            sentences = []
            for kind, text in expressions:
                sentence_id += 1
                sentences.append(
                    {"sent_id": sentence_id, "raw": text, "sent": text, "tokens": text.split(), "kind": kind}
                )
            refs.append(
                {
                    "ref_id": len(refs) + 1,
                    "ann_id": first + index,
                    "category_id": record["objects"][index]["category_id"],
                    "image_id": image_id,
                    "file_name": record["file_name"],
                    "split": record["split"],
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    instances = {
        "info": {"description": f"embedded scenes: {manifest}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, 1)],
    }
    folder = root / "refcoco"
    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps(instances, separators=(",", ":")))
    # A pickle's bytes tell which equal strings were one object, which differs between one process and several;
    # through JSON every string becomes its own.
    plain = json.loads(json.dumps(refs))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(plain, protocol=2))
    (root / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _kind_chances(level: str, split: str) -> dict[str, float]:
    if split == "testA":
        return {"attribute": 1.0}
    if split == "testB":
        return {"relation": 1.0} if level == "hard" else {"place": 1.0}
    return _KIND_CHANCES[level]


def _choose_referents(scene: Scene, rng: random.Random, chances: dict[str, float]) -> tuple[Referent, ...] | None:
    """Two to four objects with one to three expressions each; None if the scene offers fewer than two."""
    search = ExpressionSearch(scene, rng)
    wanted = rng.randint(2, min(4, len(scene.objects)))
    referents = []
    for index in rng.sample(range(len(scene.objects)), len(scene.objects)):
        found: dict[str, Expression] = {}
        for _ in range(rng.choice((1, 2, 2, 3))):
            expression = _find_any(search, index, rng, chances)
            if expression is not None:
                found.setdefault(expression.text, expression)
        if found:
            referents.append(Referent(index, tuple(found.values())))
        if len(referents) == wanted:
            break
    return tuple(referents) if len(referents) >= 2 else None


def _find_any(search: ExpressionSearch, index: int, rng: random.Random, chances: dict[str, float]) -> Expression | None:
    """An expression of a kind drawn by its chance, or of another kind if the object has none of that."""
    left = dict(chances)
    while left:
        kind = rng.choices(tuple(left), tuple(left.values()))[0]
        expression = search.find(kind, index)
        if expression is not None:
            return expression
        del left[kind]
    return None
