"""Random and mutated annotations through `data check` and a loader worker; any number of them, by hand or by a test.

    python -m tests.data.fuzz_segmentations COUNT [SEED]

ends with a line of JSON. It fails by an exception for a mask that is not the independent one, for anything but a
ValueError on the way, for a record that takes over `SECONDS` of work, and for data memory of `MEMORY` over that of the
start, of this process or of the worker.
"""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

from magnet_fast.data import ExpressionDataset, Tokenizer
from magnet_fast.data.check import check_data
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.datasets.base import BrokenRecordsError

SECONDS = 30
MEMORY = 1 << 30
HEIGHT, WIDTH = 18, 24  # of the picture that is there; what instances.json says may differ
CHUNK = 2000
ODD = [
    None, True, False, "", "x", "64", 0, -1, 1.5, -0.0, 5e-324, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**32,
    2**53 + 1, 2**63, 2**64, -(2**63), 10**400, [], {}, [[]], [None], {"counts": []}, {"size": [18, 24], "counts": ""},
    "\ud800", "\x00", "0" * 500, "o" * 500, [0] * 500, [[1, 2]] * 50,
]  # fmt: skip


class Fuzz:
    """A seeded source of annotations and of images' sizes."""

    def __init__(self, seed: int) -> None:
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
            found = self._mutated(found)
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

    def _mutated(self, node: Any) -> Any:
        draw = self.draw
        inner = list(range(len(node))) if isinstance(node, list) else list(node) if isinstance(node, dict) else []
        if inner and draw.random() < 0.75:  # further down
            key = draw.choice(inner)
            node = node.copy()
            node[key] = self._mutated(node[key])
            return node
        change = draw.randrange(7)
        if change == 0:
            return draw.choice(ODD)
        if change == 1:
            return [node]
        if isinstance(node, list) and node:
            place = draw.randrange(len(node))
            return [
                node[:place],
                node[:place] + node[place + 1 :],
                node * draw.choice([2, 3, 50]),
                node[:place] + [draw.choice(ODD)] + node[place:],
                draw.sample(node, len(node)),
            ][change - 2]
        if isinstance(node, dict) and node:
            key = draw.choice(list(node))
            left = {name: value for name, value in node.items() if name != key}
            return [left, {**left, key: draw.choice(ODD)}, {**node, draw.choice(["size", "counts", "x"]): node[key]}][
                change % 3
            ]
        if isinstance(node, str):
            place = draw.randint(0, len(node))
            odd = chr(draw.choice([draw.randrange(48, 112), draw.randrange(0x2000)]))
            return [node[:place], node[:place] + odd + node[place:], node[:place] + odd + node[place + 1 :], node * 3][
                change % 4
            ]
        if isinstance(node, (int, float)) and abs(node) < 1e300:
            return [node + 1, node - 1, node + 0.5, -node, node * 10 ** draw.randint(1, 20), float(node), str(node)][
                change
            ]
        return draw.choice(ODD)


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


def data_memory(process: int | str = "self") -> int:
    """Bytes of private memory that may be written."""
    return 1024 * int(re.search(r"VmData:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


def watch() -> None:
    """Let the system end this process, whatever it is busy with, unless this is called again in time."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of its own work: other processes do not count


def run_chunk(root: Path, fuzz: Fuzz, count: int, totals: dict[str, int]) -> None:
    """Write a data set, check it, load it, and compare."""
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
    totals["left out or broken"] += count - len(dataset)
    loader = DataLoader(Outcomes(dataset), batch_size=25, num_workers=1, timeout=20 * SECONDS, collate_fn=list)
    for ref_id, outcome in chain.from_iterable(loader):
        watch()
        if isinstance(outcome, str):
            totals["refused"] += 1
            assert "annotation" in outcome or "instances.json says" in outcome, outcome
            continue
        totals["accepted"] += 1
        expected = independent_mask(segmentations[int(ref_id)]["segmentation"], HEIGHT, WIDTH)
        assert np.array_equal(outcome, expected), segmentations[int(ref_id)]
    signal.setitimer(signal.ITIMER_PROF, 0)


def main(count: int, seed: int) -> None:
    """Run so many records and print what came of them."""
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    (root / "own").mkdir()
    (root / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images/a.png")
    totals = dict.fromkeys(("accepted", "refused", "left out or broken"), 0)
    run_chunk(root, Fuzz(-1), 20, dict(totals))  # everything is imported, and the allocator's arenas are there
    start, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    limit = data_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # the worker inherits it
    fuzz = Fuzz(seed)
    for done in range(0, count, CHUNK):
        run_chunk(root, fuzz, min(CHUNK, count - done), totals)
        print(f"{min(done + CHUNK, count)} of {count}: {totals}", file=sys.stderr, flush=True)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    totals |= {"MiB over the start": [(peak - start) >> 10 for peak in peaks], "seconds": int(time.monotonic() - began)}
    print(json.dumps(totals))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
