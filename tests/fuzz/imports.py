"""Own data for `data import`: CSV, TSV, JSON lines, COCO, CVAT, Label Studio and folders; and tables for `segment`."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np

from magnet_fast.batch.rows import read_rows
from magnet_fast.data import import_data
from tests.data import own
from tests.fuzz.mutating import mutated_bytes, mutated_tree, nested
from tests.fuzz.target import READ, Finding, Target, outcome_of

_EXPORTS = Path(own.__file__).parent / "exports"
_CELLS = [
    '"',
    '""',
    "[1,2,3,4]",
    '"[[0,0,9,0,9,9]]"',
    "{}",
    "../../a.jpg",
    "/etc/passwd",
    "\x00",
    "a\u2028b",
    "=1+1",
    ",",
    "\t",
    ";",
    "\r",
    "\n",
]
_XML = [
    '<!DOCTYPE x [<!ENTITY a "b">]>',
    "<?xml version='1.0' encoding='utf-7'?>",
    "&a;",
    "<track/>",
    "<![CDATA[x]]>",
    "</image>",
    "\x00",
    'rle="1,1,1"',
    'points="1e308,1;2,2;3,3"',
    'width="99999999999"',
    "<box/>",
]


class FuzzTarget(Target):
    """Either nothing is written, or a whole data set that opens."""

    quick: ClassVar[int] = 60
    batch: ClassVar[int] = 1000
    long: ClassVar[int] = 50_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source, self.out = folder / "source", folder / "out"
        own.draw_pictures(self.source, {"a.jpg": (18, 24), "b.png": (18, 24)})
        masks = [own.box_mask((18, 24), 2, 3, 4, 5), own.box_mask((18, 24), 9, 1, 5, 9)]
        objects = [
            own.Object(name, mask, f"the {word} one")
            for name, word in (("a.jpg", "red"), ("b.png", "blue"))
            for mask in masks
        ]
        writers = (
            own.write_csv,
            own.write_tsv,
            own.write_jsonl,
            own.write_coco,
            own.write_label_studio,
            own.write_cvat,
        )
        self.sources = [(path.name, path.read_bytes()) for path in (writer(self.source, objects) for writer in writers)]
        for name, _ in self.sources:
            (self.source / name).unlink()
        exports = [(path.name, path.read_bytes()) for path in _EXPORTS.iterdir() if path.suffix in (".json", ".xml")]
        self.sources += exports
        shapes = {"image": "a.jpg", "sentence": "left", "polygon": [[1, 1, 9, 1, 9, 9]], "box": [1, 1, 5, 5]}
        lines = [{**shapes, "box": None}, {**shapes, "polygon": None}]
        self.sources.append(("rows.jsonl", "\n".join(map(json.dumps, lines)).encode()))
        self._read_all()

    def _read_all(self) -> None:
        for name, content in self.sources:
            path = self.source / name
            path.write_bytes(content)
            with suppress(ValueError):  # of pictures that are not there
                import_data(path, self.out, images=self.source, val=0, test=0, skip_bad=True)
            path.unlink()
            shutil.rmtree(self.out, ignore_errors=True)

    def try_one(self, draw: random.Random) -> str:
        name, content = draw.choice(self.sources)
        path = self.source / name
        path.write_bytes(self._changed(draw, name, content))
        try:
            if draw.random() < 0.2 and path.suffix in (".csv", ".tsv", ".jsonl"):
                return outcome_of(lambda: read_rows(path), path, named=name)
            pictures = [self.source / "a.jpg", self.source / "b.png"]
            skip = draw.random() < 0.5
            outcome = outcome_of(
                lambda: import_data(path, self.out, images=self.source, val=0, test=0, skip_bad=skip),
                path,
                *pictures,
                named=name,
                writes=self.out,
            )
            left = sorted(one.name for one in self.out.rglob("*")) if self.out.exists() else []
            if outcome == READ:
                found = own.read(self.out)
                if not found or not all(isinstance(mask, np.ndarray) and mask.any() for mask in found.values()):
                    raise Finding("what was imported is no data set with objects")
            elif left:
                raise Finding(f"refused, and {left} was written")
            return outcome
        finally:
            path.unlink(missing_ok=True)
            shutil.rmtree(self.out, ignore_errors=True)

    def _changed(self, draw: random.Random, name: str, content: bytes) -> bytes:
        kind = draw.random()
        if kind < 0.1:
            return content
        if kind < 0.3:
            return mutated_bytes(draw, content, [other for _, other in self.sources], most=3)
        if name.endswith(".json"):
            if kind < 0.33:
                return nested(draw, 100_000).encode()
            return _dumped(self._tree(draw, json.loads(content)))
        if name.endswith(".jsonl"):
            return b"\n".join(_dumped(self._tree(draw, json.loads(line))) for line in content.splitlines())
        text = content.decode("utf-8", "replace")
        for _ in range(draw.randint(1, 3)):
            place = draw.randint(0, len(text))
            text = text[:place] + draw.choice(_XML if name.endswith(".xml") else _CELLS) + text[place:]
        return text.encode("utf-8", "replace")

    def _tree(self, draw: random.Random, tree: object) -> object:
        for _ in range(draw.choice([0, 1, 1, 2])):
            tree = mutated_tree(draw, tree)
        return tree


def _dumped(tree: object) -> bytes:
    try:
        return json.dumps(tree).encode()
    except ValueError:  # an int of more digits than Python prints
        return b"[" + b"9" * 5000 + b"]"
