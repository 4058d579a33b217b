"""What others released as .pth: zip archives of torch.save, its older form, bare pickles; mutated."""

from __future__ import annotations

import io
import json
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from magnet_fast import checkpoints
from magnet_fast.models.registry import systems
from magnet_fast.models.released import from_released
from tests.fuzz.mutating import mutated_bytes
from tests.fuzz.opcodes import dumped, program
from tests.fuzz.target import Finding, Target, outcome_of
from tests.golden.parameters import FOLDER


class FuzzTarget(Target):
    """The pickle inside an archive, the archive's own bytes, and state dicts of the right names and odd shapes."""

    quick: ClassVar[int] = 400
    batch: ClassVar[int] = 5000
    long: ClassVar[int] = 100_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        systems()  # imports them
        small = {"model": {"a.weight": torch.ones(3, 2), "a.bias": torch.arange(3)}, "epoch": 3, "lr": 0.1}
        arrays = {"state_dict": {"w": np.ones((2, 3), np.float32), "b": np.arange(3)}, "args": {"out": "x"}}
        described = json.loads((FOLDER / "lavt_window7.json").read_text())
        # One number a tensor, whatever its shape: the file is small.
        self.lavt = {
            (part, name): torch.zeros(1).expand(shape) if shape else torch.tensor(0)
            for part in ("model", "bert_model")
            for name, shape in described[part].items()
        }
        self.zips = [saved(small), saved({"state_dict": small["model"], "model_ema": small["model"]})]
        self.legacy = [saved(small, zipped=False)]
        self.bare = dumped([arrays])
        self.path, self.canary = folder / "released.pth", folder / "canary"

    def try_one(self, draw: random.Random) -> str:
        self.path.write_bytes(self._content(draw))
        reader = draw.choice([from_released, checkpoints.load])
        outcome = outcome_of(lambda: reader(self.path), self.path, named="released.pth")
        if self.canary.exists():
            raise Finding("code of the checkpoint was run")
        return outcome

    def _content(self, draw: random.Random) -> bytes:
        kind = draw.random()
        if kind < 0.015:  # a third of a second, where its names are right
            return saved(self._odd_shapes(draw))
        if kind < 0.25:
            return mutated_bytes(draw, draw.choice(self.zips), self.bare)
        if kind < 0.45:
            return program(draw, self.legacy, self.canary)
        if kind < 0.6:
            return program(draw, self.bare, self.canary)
        if kind < 0.7:
            return saved(self._wrapped(draw))
        return self._other_pickle(draw, draw.choice(self.zips))

    def _wrapped(self, draw: random.Random, depth: int = 4) -> Any:
        """Dictionaries, lists and odd tensors within each other, under the names that checkpoints have."""
        kind = 1.0 if depth == 4 else draw.random()
        if kind < 0.3 or not depth:
            return draw.choice(self._values(draw))
        names = [
            "model",
            "state_dict",
            "module",
            "model_ema",
            "optimizer",
            "a.weight",
            "classifier.conv",
            3,
            ("t",),
            "",
        ]
        return {draw.choice(names): self._wrapped(draw, depth - 1) for _ in range(draw.randint(0, 4))}

    def _values(self, draw: random.Random) -> list[Any]:
        size = draw.choice([0, 1, 64, 1 << 20, 1 << 31, 1 << 40])
        tensors = [
            torch.zeros(1).expand(size, draw.choice([1, 64, 96])),
            torch.zeros(2, 2).to_sparse(),
            torch.zeros(2, device="meta"),
        ]
        tensors += [torch.zeros(2, dtype=dtype) for dtype in (torch.int8, torch.bool, torch.complex64, torch.bfloat16)]
        tensors += [
            torch.tensor(1.0),
            torch.zeros(3, requires_grad=True),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        ]
        return [None, 3, "text", [1, torch.ones(2)], {}, {"a": 1}, float("nan"), *tensors]

    def _odd_shapes(self, draw: random.Random) -> dict[str, Any]:
        """A whole checkpoint, some of whose entries are lacking, renamed, of another shape, dtype or kind."""
        state = dict(self.lavt)
        for _ in range(draw.choice([0, 0, 1, 2])):
            part, name = draw.choice(list(state))
            kept = state[part, name]
            change = draw.randrange(4)
            if change == 0:
                del state[part, name]
            elif change == 1:
                state[part, draw.choice([name + "x", f"module.{name}", name.replace("0", "7")])] = kept
            elif change == 2 and isinstance(kept, torch.Tensor):
                shape = list(kept.shape) or [1]
                shape[draw.randrange(len(shape))] = draw.choice([0, 1, 3, 1000, 10**8, 10**12])
                state[part, name] = torch.zeros(1).expand(shape)
            else:
                state[part, name] = draw.choice(self._values(draw))
        return {
            part: {name: value for (of, name), value in state.items() if of == part} for part in ("model", "bert_model")
        }

    def _other_pickle(self, draw: random.Random, archive: bytes) -> bytes:
        """The archive with another program in its data.pkl; now and then entries lacking, renamed or deflated."""
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as old, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that come twice
            with zipfile.ZipFile(made, "w") as new:
                for entry in old.infolist():
                    content = old.read(entry)
                    if entry.filename.endswith("data.pkl"):
                        content = program(draw, [content], self.canary)
                    elif draw.random() < 0.1:
                        content = mutated_bytes(draw, content)
                    if draw.random() < 0.03:
                        continue
                    name = (
                        draw.choice(["archive/constants.pkl", "x", "../../canary"])
                        if draw.random() < 0.02
                        else entry.filename
                    )
                    new.writestr(name, content, draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
        return made.getvalue()


def saved(content: Any, *, zipped: bool = True) -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
