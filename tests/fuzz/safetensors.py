"""Headers of .safetensors: lengths, offsets, dtypes, shapes and metadata that do not fit, through all their readers."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any, ClassVar

from magnet_fast import checkpoints
from magnet_fast.models.files import read_safetensors
from magnet_fast.models.registry import systems
from magnet_fast.models.weights import load
from magnet_fast.training.checkpoint import load_checkpoint
from tests.fuzz.mutating import mutated_bytes, mutated_tree, nested
from tests.fuzz.target import Target, outcome_of

_DTYPES = ["F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", 3]


class FuzzTarget(Target):
    """A small file whose header is written by hand."""

    quick: ClassVar[int] = 300
    batch: ClassVar[int] = 2000
    long: ClassVar[int] = 100_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        systems()
        self.path = folder / "model.safetensors"

    def try_one(self, draw: random.Random) -> str:
        self.path.write_bytes(self._content(draw))
        reader = draw.choice([read_safetensors, checkpoints.load, load, load_checkpoint])
        return outcome_of(lambda: reader(self.path), self.path, named="model.safetensors")

    def _content(self, draw: random.Random) -> bytes:
        header: Any = {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
            "__metadata__": {
                "format": draw.choice(["pt", "magnet_fast.model/2", "magnet_fast.training/3"]),
                "state": "{}",
            },
        }
        data = bytes(32)
        for _ in range(draw.choice([0, 1, 1, 2, 3])):
            change = draw.randrange(7)
            if change == 0:
                header["a"]["dtype"] = draw.choice(_DTYPES)
            elif change == 1:
                header["a"]["shape"] = draw.choice(
                    [[], [0], [6], [-1, 6], [1 << 40, 1 << 40], [2**63], [1] * 100, "x", [1.5]]
                )
            elif change == 2:
                header["b"]["data_offsets"] = draw.choice(
                    [[0, 8], [23, 31], [24, 40], [32, 24], [1 << 62, (1 << 62) + 8], [-8, 0], []]
                )
            elif change == 3:
                data = bytes(draw.choice([0, 31, 33, 1000]))
            elif change == 4:
                header["__metadata__"] = draw.choice(
                    [
                        {},
                        None,
                        {"format": 3},
                        {"format": "magnet_fast.training/3", "state": nested(draw, 100_000)},
                        {"state": "[]"},
                    ]
                )
            else:
                header = mutated_tree(draw, header)
                if (
                    not isinstance(header, dict)
                    or not {"a", "b"} <= header.keys()
                    or not isinstance(header["a"], dict)
                    or not isinstance(header["b"], dict)
                ):
                    break
        try:
            text = json.dumps(header).encode()
        except ValueError:  # an int of more digits than Python prints
            text = b"{" + b"9" * 5000
        if draw.random() < 0.02:
            text = nested(draw, draw.choice([100, 100_000])).encode()
        length = (
            len(text)
            if draw.random() < 0.9
            else draw.choice([0, 1, len(text) - 1, len(text) + 1, 1 << 27, (1 << 63) - 1, (1 << 64) - 1])
        )
        content = struct.pack("<Q", length) + text + data
        return mutated_bytes(draw, content, most=3) if draw.random() < 0.3 else content
