"""REFER's refs(*).p: pickles of plain data, mutated, through the reader of plain pickles."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import numpy as np

from magnet_fast.data.safe_pickle import load_plain_pickle
from tests.data.layout import small_refs
from tests.fuzz.opcodes import dumped, program
from tests.fuzz.target import Finding, Target, outcome_of


class FuzzTarget(Target):
    """Opcodes put in, left out, exchanged, and calls among them."""

    quick: ClassVar[int] = 300
    batch: ClassVar[int] = 2000
    long: ClassVar[int] = 100_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        refs = small_refs()
        numbers = [{"box": np.arange(4.0), "id": np.int64(3), "size": np.float32(0.5), "names": (b"a", "b", 1.5, None)}]
        self.pickles = dumped([refs, refs[:1], numbers])
        self.path, self.canary = folder / "refs(unc).p", folder / "canary"

    def try_one(self, draw: random.Random) -> str:
        self.path.write_bytes(program(draw, self.pickles, self.canary))
        outcome = outcome_of(lambda: load_plain_pickle(self.path), self.path, named=str(self.path))
        if self.canary.exists():
            raise Finding("code of the pickle was run")
        return outcome
