"""Data sets of every format, one of their files mutated: opened, checked, and a few samples read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar

from magnet_fast.data.check import check_data
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.datasets.base import BrokenRecordsError
from tests.data import layout, test_complex_queries, test_phrasecut, test_regions
from tests.fuzz.mutating import mutated_bytes, mutated_tree, nested
from tests.fuzz.target import Target, outcome_of


class FuzzTarget(Target):
    """Every reader's refs, sentences, image sizes and masks."""

    quick: ClassVar[int] = 60
    batch: ClassVar[int] = 1000
    long: ClassVar[int] = 50_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        several = layout.small_refs()
        several[0] = {**several[0], "ann_id": [70, 71], "no_target": False}
        roots = [
            (layout.write_root(folder / "refer"), "refcoco"),
            (layout.write_root(folder / "list", name="refs(unc).json"), "refcoco"),
            (
                layout.write_root(folder / "several", refs=several, name="grefs(unc).json", dataset="grefcoco"),
                "grefcoco",
            ),
            (test_phrasecut.write(folder / "phrasecut", test_phrasecut.small_tasks()), "VGPhraseCut_v0"),
            (test_regions.write(folder / "regions"), "talk2car"),
            (test_complex_queries.write(folder / "queries"), "ris_cq"),
        ]
        self.files = [
            (root, dataset, file, file.read_bytes())
            for root, dataset in roots
            for file in sorted((root / dataset).rglob("*.json"))
        ]
        for root, dataset in roots:
            self._look(root, dataset)

    def try_one(self, draw: random.Random) -> str:
        root, dataset, file, content = draw.choice(self.files)
        file.write_bytes(self._changed(draw, content))
        try:
            return outcome_of(lambda: self._look(root, dataset), file, named=root.name)
        finally:
            file.write_bytes(content)

    def _look(self, root: Path, dataset: str) -> None:
        report = check_data(root, dataset)
        assert all("\n" not in problem for problem in report.problems), "a problem of several lines"
        try:
            reader = open_reader(root, dataset)
        except BrokenRecordsError as error:
            reader = error.reader
        for split in reader.splits:
            for ref in reader.refs(split)[:4]:
                for sentence in ref.sentences[:2]:
                    try:
                        size = reader.image_size(ref.image_id)
                        mask = reader.mask(ref, sentence)
                        reader.extra(ref, sentence)
                        reader.image_path(ref.image_id)
                    except (ValueError, FileNotFoundError):
                        continue
                    assert mask.shape == tuple(size), f"a mask of {mask.shape} for an image of {size}"

    def _changed(self, draw: random.Random, content: bytes) -> bytes:
        kind = draw.random()
        if kind < 0.1:
            return mutated_bytes(draw, content, most=3)
        if kind < 0.12:
            return nested(draw, draw.choice([500, 100_000])).encode()
        tree: Any = json.loads(content)
        for _ in range(draw.choice([1, 1, 2, 3])):
            tree = mutated_tree(draw, tree)
        try:
            return json.dumps(tree).encode()
        except ValueError:
            return b"[" + b"9" * 5000 + b"]"
