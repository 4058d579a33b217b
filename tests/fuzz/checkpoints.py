"""Our own checkpoints, of a tiny model and of a run: their metadata, entries and bytes mutated."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from magnet_fast import checkpoints, models
from magnet_fast.models import hub, weights
from magnet_fast.models.tensor_file import _DTYPES
from magnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from tests.fuzz.mutating import ODD, mutated_bytes, mutated_tree, nested
from tests.fuzz.target import READ, Finding, Target, outcome_of

_NAMES = {getattr(torch, name): key for key, name in _DTYPES.items() if hasattr(torch, name)}
_SIZES = [0, 1, 2, 3, 7, 64, 1000, 10**5, 10**9, -1, 1.5, "64", None, 2**70]


class FuzzTarget(Target):
    """Models and runs; what is read is whole, or the file is refused."""

    quick: ClassVar[int] = 60
    batch: ClassVar[int] = 1000
    long: ClassVar[int] = 100_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        small = {"image__embed_dim": 8, "image__num_heads": (1, 1, 1, 1), "image__depths": (1, 1, 1, 1)}
        small |= {"text__num_layers": 1, "text__hidden_size": 16, "text__num_heads": 1, "text__intermediate_size": 16}
        model = models.create("lavt_tiny", **small, text__vocab_size=64, text__max_positions=8, input__max_tokens=6)
        plain = folder / "plain.safetensors"
        self.kinds: list[tuple[dict[str, Tensor], dict[str, str]]] = []
        for settings in ({}, {"compact": True}):
            weights.save(model, plain, {"tokenizer_vocab": "x", "image_size": "32"}, **settings)
            self.kinds.append(_taken(plain))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_checkpoint(
            {
                "model_config": model.config.model_dump(mode="json"),
                "metadata": {"tokenizer_vocab": "x"},
                "model": state,
                "ema": {},
                "optimiser": {"state": {0: {"step": torch.ones(1)}}, "groups": [{"lr": 0.1}]},
                "step": 3,
            },
            plain,
        )
        self.kinds.append(_taken(plain))
        plain.unlink()
        hub.save_pretrained(model, folder / "pretrained")
        self.bytes: dict[int, bytes] = {}
        for tensors, metadata in self.kinds:
            for tensor in tensors.values():
                self.bytes[id(tensor)] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            plain.write_bytes(self._packed(tensors, metadata))
            again, described = _taken(plain)
            assert described == metadata and all(torch.equal(again[name], tensors[name]) for name in tensors)
        plain.unlink()
        self.described = json.loads((folder / "pretrained" / hub.CONFIG).read_text())
        self.path = folder / "model.safetensors"

    def try_one(self, draw: random.Random) -> str:
        if draw.random() < 0.15:
            return self._pretrained(draw)
        tensors, metadata = self._changed(draw, *draw.choice(self.kinds))
        content = self._packed(tensors, metadata)
        if draw.random() < 0.2:
            content = mutated_bytes(draw, content, most=3)
        self.path.write_bytes(content)
        if draw.random() < 0.25:
            return outcome_of(lambda: load_checkpoint(self.path), self.path, named="model.safetensors")
        found: list[checkpoints.Checkpoint] = []
        outcome = outcome_of(lambda: found.append(checkpoints.load(self.path)), self.path, named="model.safetensors")
        if outcome == READ and not all(isinstance(value, str) for value in found[0].metadata.values()):
            raise Finding("metadata that are no text")
        return outcome

    def _packed(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
        """As safetensors writes it; of the tensors that stay the same all the time the bytes are made once."""
        header: dict[str, Any] = {"__metadata__": metadata}
        parts, place = [], 0
        for name, tensor in tensors.items():
            if id(tensor) not in self.bytes:
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            else:
                data = self.bytes[id(tensor)]
            dtype, end = _NAMES[tensor.dtype], place + len(data)
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
            parts.append(data)
            place = end
        text = json.dumps(header).encode()
        return b"".join([struct.pack("<Q", len(text)), text, *parts])

    def _changed(
        self, draw: random.Random, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, metadata = dict(tensors), dict(metadata)
        for _ in range(draw.choice([0, 1, 1, 2, 4])):
            if draw.random() < 0.4:
                name = draw.choice(list(tensors))
                kept = tensors[name]
                change = draw.randrange(5)
                if change == 0:
                    del tensors[name]
                elif change == 1:
                    tensors[draw.choice(["x", f"module.{name}", f"{name}.x", f"{name}::scales"])] = tensors.pop(name)
                elif change == 2:
                    tensors[name] = kept[:-1].clone() if kept.dim() else kept.reshape(1)
                elif change == 3:
                    tensors[name] = kept.to(
                        draw.choice([torch.int8, torch.float16, torch.float64, torch.bool, torch.int64])
                    )
                else:
                    tensors[name] = torch.full_like(kept, float("nan")) if kept.is_floating_point() else kept + 1
                if not tensors:
                    tensors["x"] = torch.ones(1)
                continue
            key = draw.choice(list(metadata) or ["format"])
            metadata[key] = self._text(draw, metadata.get(key, ""))
            if draw.random() < 0.1:
                metadata[draw.choice(["config", "bases", "state", "format", "image_size", "max_words"])] = draw.choice(
                    [
                        "",
                        "x",
                        "{}",
                        "[]",
                        "null",
                        "1e999",
                        '{"image": {"source": "x"}}',
                        '{"text": 3}',
                        "magnet_fast.model/3",
                        "magnet_fast.model/9",
                        "magnet_fast.training/3",
                    ]
                )
        return tensors, metadata

    def _text(self, draw: random.Random, text: str) -> str:
        """JSON with a change in it, or a text with one."""
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            return draw.choice(["", text + "x", text[:-1], "\ufffd"])
        kind = draw.random()
        if kind < 0.05:
            return nested(draw, draw.choice([10, 100_000]))
        if kind < 0.1:
            return text[: draw.randrange(len(text) + 1)]
        try:
            return json.dumps(mutated_tree(draw, tree, _SIZES if draw.random() < 0.7 else ODD))
        except ValueError:
            return "9" * 5000

    def _pretrained(self, draw: random.Random) -> str:
        """A folder of save_pretrained's, with another config.json."""
        folder = self.folder / "stranger"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "pretrained", folder)
        text = self._text(draw, json.dumps(self.described))
        (folder / hub.CONFIG).write_text(text, encoding="utf-8", errors="replace")
        if draw.random() < 0.3:
            file = folder / hub.WEIGHTS
            file.write_bytes(mutated_bytes(draw, file.read_bytes(), most=3))
        return outcome_of(lambda: checkpoints.load(folder), folder / hub.CONFIG, folder / hub.WEIGHTS, named="stranger")


def _taken(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, in an order that does not hang on the process: a finding can be made again."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, dict(sorted(file.metadata().items()))
