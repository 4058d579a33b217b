"""Random and mutated annotations through `data check` and a loader's worker.

A finding is a mask that is not the independent one, anything but a ValueError on the way, and a record that takes over
`SECONDS` of work.
"""

from __future__ import annotations

import json
import random
import signal
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

from magnet_fast.data import ExpressionDataset, Tokenizer
from magnet_fast.data.check import check_data
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.datasets.base import BrokenRecordsError
from tests.fuzz.mutating import ODD, mutated_tree
from tests.fuzz.target import READ, REFUSED, Target

SECONDS = 30
HEIGHT, WIDTH = 18, 24  # of the picture that is there; what instances.json says may differ


class Fuzz:
    """A seeded source of annotations and of images' sizes."""

    def __init__(self, seed: int | str) -> None:
        self.draw = random.Random(seed)

    def size(self) -> tuple[Any, Any]:
        """Mostly that of the picture, now and then another one, or none at all."""
        chance = self.draw.random()
        if chance < 0.97:
            return HEIGHT, WIDTH
        if chance < 0.998:
            side = [1, 2, 17, 500, "18", 18.0, *ODD]
            return self.draw.choice(side), self.draw.choice(side)
        return self.draw.choice([(3000, 4000), (1, 1_000_000), (13_000, 13_000), (1_000_000, 170), (2**31, 2**31)])

    def segmentation(self, height: Any, width: Any) -> Any:
        """A sound segmentation for an image of this size, mutated up to four times."""
        sound = type(height) is type(width) is int and min(height, width) > 0 and height * width < 1e6
        found: Any = self._sound(*((height, width) if sound else (HEIGHT, WIDTH)))
        for _ in range(self.draw.choice([0, 0, 1, 1, 1, 2, 3, 4])):
            found = mutated_tree(self.draw, found)
        return found

    def _sound(self, height: int, width: int) -> Any:
        draw = self.draw
        parts = [self._part(height, width) for _ in range(draw.choice([1, 1, 1, 2, 5]))]
        kind = draw.random()
        if kind < 0.1:
            return parts[0]  # a polygon flat, or an RLE
        if kind < 0.2 and isinstance(parts[0], list):
            return [parts[0][i : i + 2] for i in range(0, len(parts[0]), 2)]
        return [parts] if kind > 0.95 else parts

    def _part(self, height: int, width: int) -> Any:
        draw = self.draw
        if draw.random() < 0.6:
            reach = draw.choice([0, 0, 0, 1, 4, 1000])
            convert = draw.choice([round, float, lambda value: round(value * 2) / 2])
            return [
                convert(draw.uniform(-reach, (side + reach)))
                for _ in range(draw.choice([1, 2, 3, 4, 7, 30]))
                for side in (width, height)
            ]
        mask = np.zeros((height, width), dtype=np.uint8)
        mask.flat[[draw.randrange(mask.size) for _ in range(draw.choice([0, 1, 5, 100]))]] = 1
        if draw.random() < 0.5:
            rle = coco_mask.encode(np.asfortranarray(mask))
            return {"size": rle["size"], "counts": rle["counts"].decode()}
        runs, value = [0], 0
        for pixel in mask.T.flat:
            if pixel != value:
                runs.append(0)
                value = pixel
            runs[-1] += 1
        return {"size": [height, width], "counts": runs}


def independent_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Of a segmentation that was accepted: RLE by a loop, each polygon by pycocotools on its own, then their union."""
    mask = np.zeros((height, width), dtype=np.uint8)
    for part in leaves(segmentation):
        if isinstance(part, list):
            if len(part) >= 6 and len(part) % 2 == 0:
                (rle,) = coco_mask.frPyObjects([part], height, width)
                mask |= coco_mask.decode(rle)
        elif part.get("counts"):
            place, value = 0, 0
            for run in loop_uncompress(part["counts"]) if isinstance(part["counts"], str) else part["counts"]:
                for pixel in range(place, place + int(run)) if value else ():
                    mask[pixel % height, pixel // height] = 1
                place, value = place + int(run), 1 - value
    return mask


def leaves(node: Any) -> list[Any]:
    """Polygons and RLEs, however nested; three points or more, in pairs, are a polygon."""
    if isinstance(node, dict) or not any(isinstance(inner, (list, dict)) for inner in node):
        return [node]
    pairs = all(isinstance(inner, list) and len(inner) == 2 for inner in node)
    if pairs and len(node) > 2 and not any(isinstance(value, (list, dict)) for pair in node for value in pair):
        return [[value for pair in node for value in pair]]
    return [leaf for inner in node for leaf in leaves(inner)]


def loop_uncompress(counts: str) -> list[int]:
    """COCO's string, a character at a time."""
    runs, number, shift = [], 0, 0
    for code in (ord(character) - 48 for character in counts):
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            number -= (1 << shift) if code & 16 else 0
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return runs


class Outcomes(Dataset):
    """What a loader worker makes of each item: its mask, or the message of its ValueError."""

    def __init__(self, dataset: ExpressionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        watch()
        try:
            sample = self.dataset[index]
        except ValueError as error:
            return index, str(error)
        return sample["ref"], sample["original_mask"].numpy()


def watch() -> None:
    """Let the system end this process, whatever it is busy with, unless this is called again in time."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of its own work: other processes do not count


def run_chunk(root: Path, fuzz: Fuzz, count: int) -> list[str]:
    """Write a data set, check it, load it, and compare; what came of each annotation."""
    sizes = [fuzz.size() for _ in range(count)]
    segmentations = [fuzz.segmentation(*size) for size in sizes]
    content = {
        "images": [{"id": i, "file_name": "a.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "annotations": [{"id": i, "image_id": i, "segmentation": one} for i, one in enumerate(segmentations)],
    }
    refs = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": "train", "sentences": ["the red one"]} for i in range(count)
    ]
    (root / "own/instances.json").write_text(json.dumps(content))
    (root / "own/refs(unc).json").write_text(json.dumps(refs))
    segmentations = json.loads((root / "own/instances.json").read_text())["annotations"]
    watch()
    report = check_data(root, "own", progress=lambda done, total: watch())
    assert all("\n" not in problem for problem in report.problems)
    try:
        reader = open_reader(root, "own")
    except BrokenRecordsError as error:
        reader = error.reader
    dataset = ExpressionDataset(reader, "train", Tokenizer(), 16, original=True)
    outcomes = [REFUSED] * (count - len(dataset))
    loader = DataLoader(Outcomes(dataset), batch_size=25, num_workers=1, timeout=20 * SECONDS, collate_fn=list)
    for ref_id, outcome in chain.from_iterable(loader):
        watch()
        if isinstance(outcome, str):
            outcomes.append(REFUSED)
            assert "annotation" in outcome or "instances.json says" in outcome, outcome
            continue
        outcomes.append(READ)
        expected = independent_mask(segmentations[int(ref_id)]["segmentation"], HEIGHT, WIDTH)
        assert np.array_equal(outcome, expected), segmentations[int(ref_id)]
    signal.setitimer(signal.ITIMER_PROF, 0)
    return outcomes


class FuzzTarget(Target):
    """Data sets of `together` annotations, through `data check` and a loader's worker."""

    quick: ClassVar[int] = 400
    together: ClassVar[int] = 500
    batch: ClassVar[int] = 20_000
    long: ClassVar[int] = 1_000_000
    memory: ClassVar[int] = 1 << 31  # the records are read a second time, slowly, beside what the readers hold

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "own").mkdir()
        (folder / "images").mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images/a.png")
        warnings.simplefilter("ignore")
        run_chunk(folder, Fuzz(-1), 20)  # everything is imported, and the allocator's arenas are there

    def try_one(self, draw: random.Random) -> str:
        raise NotImplementedError("annotations are tried many at once")

    def try_many(self, seed: int, first: int, count: int, done: Callable[[int, str | BaseException], None]) -> None:
        # Not by the audit hook: the loader forks. Numbers count from the chunk's first one.
        for begin in range(first, first + count, self.together):
            size = min(self.together, first + count - begin)
            try:
                outcomes: list[str | BaseException] = [*run_chunk(self.folder, Fuzz(f"{seed} {begin}"), size)]
            except BaseException as error:
                outcomes = [error] + [REFUSED] * (size - 1)
            for number, outcome in enumerate(outcomes, begin):
                done(number, outcome)
