"""A collection in REFER's layout: splits by picture, then instances.json and refs, both or neither."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magnet_fast.atomic import naming
from magnet_fast.data.importing.collecting import Collection

SPLITS = ("train", "val", "test")
REFS_NAME = "refs(unc).json"  # the reader's default, so that --split-by need not be given


def assign_splits(names: Sequence[str], val: float, test: float, seed: int) -> list[str]:
    """The split of each picture, drawn by the seed from the pictures' names, in whatever order these come.

    Args:
        names: of the pictures, each another one.
        val, test: shares of the pictures, at least one picture each unless 0; train has the rest.

    Raises ValueError where train would have none.
    """
    counts = {split: max(1, round(share * len(names))) for split, share in (("val", val), ("test", test)) if share}
    rest = len(names) - sum(counts.values())
    if rest < 1:
        raise ValueError(
            f"pictures: {len(names)} can be used, val and test take {sum(counts.values())} of them; expected at least "
            "one for train: give more pictures, or --val 0 or --test 0"
        )
    splits = [split for split, count in {"train": rest, **counts}.items() for _ in range(count)]
    random.Random(f"magnet_fast import {seed}").shuffle(splits)
    assigned = dict(zip(sorted(names), splits, strict=True))
    return [assigned[name] for name in names]


def records(
    found: Collection, splits: dict[int, str], image_root: str, description: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What instances.json and the refs file hold. Ids count from 1.

    Args:
        splits: split of each picture that is used, by its place.
        image_root: folder of the pictures, as `Refer` reads it.
        description: of the data.
    """
    categories = {name: number for number, name in enumerate(sorted({one.category for one in found.annotations}), 1)}
    instances = {
        "info": {"description": description, "image_root": image_root},
        "images": [
            {"id": place + 1, "file_name": picture.name, "height": picture.height, "width": picture.width}
            for place, picture in enumerate(found.pictures)
            if place in splits
        ],
        "annotations": [
            {
                "id": number,
                "image_id": one.picture + 1,
                "category_id": categories[one.category],
                "segmentation": one.segmentation,
                "area": one.area,
                "bbox": one.bbox,
                "iscrowd": 0,
            }
            for number, one in enumerate(found.annotations, 1)
        ],
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }
    refs, sent_id = [], 0
    for picture, named, sentences in found.refs():
        listed = []
        for sentence in sentences:
            sent_id += 1
            listed.append({"sent_id": sent_id, "raw": sentence, "sent": sentence, "tokens": sentence.split()})
        ann_ids = [place + 1 for place in named]
        category_ids = [categories[found.annotations[place].category] for place in named]
        refs.append(
            {
                "ref_id": len(refs) + 1,
                "ann_id": ann_ids[0] if len(named) == 1 else ann_ids,
                "category_id": category_ids[0] if len(named) == 1 else category_ids,
                "image_id": picture + 1,
                "file_name": found.pictures[picture].name,
                "split": splits[picture],
                "sent_ids": [one["sent_id"] for one in listed],
                "sentences": listed,
            }
        )
    return instances, refs


def write_folder(folder: Path, files: dict[str, Any]) -> None:
    """Write JSON files into a new folder, which appears under its name only once complete.

    Where that fails or is stopped, nothing of it stays, nor of the folders above that it made.
    """
    made = [one for one in (folder.parent, *folder.parent.parents) if not one.exists()]
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with naming(folder):
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        for name, content in files.items():
            with naming(folder / name), (partial / name).open("w", encoding="utf-8") as file:
                json.dump(content, file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, folder)
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for one in made:
            try:
                one.rmdir()
            except OSError:
                break
        raise
