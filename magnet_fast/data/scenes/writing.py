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
from pathlib import Path

import numpy as np
from PIL import Image

from magnet_fast.atomic import naming
from magnet_fast.data.loading import workers_watched
from magnet_fast.data.polygons import mask_to_polygons
from magnet_fast.data.scenes.describing import describe_scene
from magnet_fast.data.scenes.drawing import SHAPES, SceneObject
from magnet_fast.data.scenes.expressions import Expression
from magnet_fast.data.scenes.generation import LEVELS
from magnet_fast.data.segmentation import bounding_box
from magnet_fast.models.contract import check_side

FORMAT = "magnet_fast.scenes/1"
MANIFEST = "scenes.json"
_IMAGE_FOLDER = Path("images/mscoco/images/train2014")
_JPEG_QUALITY = 92
_CHUNK = 50  # images per piece of work


def write_scenes(
    out: str | os.PathLike[str],
    images: int,
    seed: int,
    level: str = "easy",
    image_size: int = 128,
    *,
    negatives: int = 0,
    several: int = 0,
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

    Args:
        out: the folder; absent, empty, or holding scenes of these same arguments, which are kept as they are. It
            appears under its name only once complete.
        images: number of pictures, at least 4.
        seed: of everything drawn.
        level: "easy" or "hard".
        image_size: side of the pictures in pixels, 64 to 4096.
        negatives: at most so many sentences a ref that name nothing: one of its sentences with one thing changed,
            proven to fit no object. Written in R-RefCOCO's way, with the key "exist" False, after the ref's other
            sentences. Their kind says what was changed: "absent/shape", "absent/colour", "absent/size",
            "absent/texture", "absent/place", "absent/rank", "absent/relation", "absent/anchor" (a property of the
            object that the sentence relates to). The fewer there are, the more of them speak of what the picture shows
            elsewhere: with one a ref, a third of the colours and shapes, with ten a tenth.
        several: at most so many sentences a picture that name several objects, "the two red circles" or all of a kind,
            but never all objects of the picture. Written in gRefCOCO's way, `ann_id` and `category_id` lists, as refs
            after the picture's others. Kinds: "several/attribute", "several/place", "several/relation", and
            "several/pair" ("the red circle and the blue star"); in testA and testB as above.
            Pictures and all other sentences are the same with `negatives` and `several` as without.
        workers: processes.
        progress: show a progress bar; None shows it on an interactive terminal only.

    Raises:
        TypeError, ValueError: an argument is no integer, or out of range.
        FileExistsError: `out` holds anything but scenes of these same arguments.
    """
    _check_arguments(images, seed, level, image_size, negatives, several, workers)
    out = Path(out)
    target = out.resolve()  # renaming onto a link would replace the link
    manifest = {"format": FORMAT, "images": images, "seed": seed, "level": level, "image_size": image_size}
    manifest |= {name: value for name, value in (("negatives", negatives), ("several", several)) if value}
    if _already_written(target, manifest):
        return out
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target):
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with naming(target):
            (partial / _IMAGE_FOLDER).mkdir(parents=True)
            _write_all(partial, manifest, workers, progress)
            partial.chmod(0o755)  # mkdtemp makes it private
            os.replace(partial, target)  # absent or an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def assign_splits(images: int, seed: int) -> list[str]:
    """Split of each image: 80 % train, 10 % val, 5 % testA, 5 % testB, at least one image each."""
    counts = {"val": max(1, round(0.1 * images)), "testA": max(1, round(0.05 * images))}
    counts["testB"] = counts["testA"]
    splits = [split for split, count in counts.items() for _ in range(count)]
    splits += ["train"] * (images - len(splits))
    random.Random(f"magnet_fast splits {seed}").shuffle(splits)
    return splits


def _check_arguments(
    images: int, seed: int, level: str, image_size: int, negatives: int, several: int, workers: int
) -> None:
    check_side(image_size, "image_size", least=64)
    for name, value, least in (
        ("images", images, 4),
        ("seed", seed, 0),
        ("negatives", negatives, 0),
        ("several", several, 0),
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
        found = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{out} exists and holds no embedded scenes; expected an empty or absent folder"
        ) from None
    if found == manifest:
        return True
    raise FileExistsError(f"{out} holds other scenes: {found}; asked for {manifest}. Name another folder")


@workers_watched()
def _write_all(root: Path, manifest: dict, workers: int, progress: bool | None) -> None:
    images = manifest["images"]
    splits = assign_splits(images, manifest["seed"])
    jobs = [(root, manifest, start, splits[start : start + _CHUNK]) for start in range(0, images, _CHUNK)]
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


def _write_images(job: tuple[Path, dict, int, list[str]]) -> list[dict]:
    """Draw and write one piece's images; returns what the annotation files need of each."""
    root, manifest, start, splits = job
    seed, level, image_size = manifest["seed"], manifest["level"], manifest["image_size"]
    more = {name: manifest.get(name, 0) for name in ("negatives", "several")}
    records = []
    for number, split in enumerate(splits, start):
        described = describe_scene(seed, number, level, split, image_size, **more)
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
                    (referent.indices, [_sentence_record(one) for one in (*referent.expressions, *referent.absent)])
                    for referent in described.referents
                ],
            }
        )
    return records


def _sentence_record(expression: Expression) -> dict:
    text = expression.text
    record = {"raw": text, "sent": text, "tokens": text.split(), "kind": expression.label}
    return record if expression.changed is None else {**record, "exist": False}


def _object_record(item: SceneObject, mask: np.ndarray) -> dict:
    return {
        "segmentation": mask_to_polygons(mask),
        "area": int(mask.sum()),
        "bbox": bounding_box(mask),
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
        for indices, expressions in record["referents"]:
            sentences = []
            for expression in expressions:
                sentence_id += 1
                sentences.append({"sent_id": sentence_id, **expression})
            ann_ids = [first + index for index in indices]
            categories = [record["objects"][index]["category_id"] for index in indices]
            alone = len(indices) == 1
            refs.append(
                {
                    "ref_id": len(refs) + 1,
                    "ann_id": ann_ids[0] if alone else ann_ids,
                    "category_id": categories[0] if alone else categories,
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
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
