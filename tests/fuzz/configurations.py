"""Configurations in YAML and `--set`, mutated as trees and as text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import yaml

from magnet_fast.training.config import CONFIG_FOLDER, dump_config, load_config
from tests.fuzz.mutating import ODD, mutated_bytes, mutated_tree
from tests.fuzz.target import Target, outcome_of

_SNIPPETS = [
    "!!python/object/apply:os.system ['touch canary']\n",
    "a: &a [*a]\n",
    "x: &x {y: *x}\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "1: 2\n",
    "seed: 2001-99-99\n",
    "seed: 0x_\n",
    "seed: 0b\n",
    "seed: 1:99:99\n",
    "seed: !!int x\n",
    "seed: !!float x\n",
    "seed: !!binary x\n",
    "seed: !!timestamp x\n",
    "seed: .inf\n",
    "seed: .nan\n",
    "seed: !!bool x\n",
    "<<: 3\n",
    "<<: [3]\n",
    "%YAML 9.9\n---\n",
    "---\n---\n",
    "\x00",
    "\ufeff",
    "base: .\n",
    "base: ..\n",
    "base: config.yaml\n",
    "base: magnet_tiny_scenes\n",
    'base: "\\0"\n',
    "base: ''\n",
    "seed: " + "9" * 5000 + "\n",
    "a: " + "[" * 3000 + "\n",
    "- " * 3000 + "\n",
    "a: " + "{a: " * 3000 + "\n",
    "data: {root: '" + "a/" * 3000 + "'}\n",
    "!!set {a}\n",
    "!!omap [a]\n",
    "l0: &l0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "model: {overrides: {a: &l0 [x,x], b: &l1 [*l0,*l0], c: [*l1,*l1]}}\n",
]


class FuzzTarget(Target):
    """What is read can be written and read again."""

    quick: ClassVar[int] = 60
    batch: ClassVar[int] = 1000
    long: ClassVar[int] = 50_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.texts = [path.read_text() for path in sorted(CONFIG_FOLDER.glob("*.yaml"))]
        self.trees = [yaml.safe_load(text) for text in self.texts]
        self.path = folder / "config.yaml"
        load_config("magnet_tiny_scenes")

    def try_one(self, draw: random.Random) -> str:
        self.path.write_bytes(self._content(draw))
        overrides = [self._override(draw)] if draw.random() < 0.3 else []

        def read() -> None:
            config = load_config(self.path, overrides)
            dump_config(config)

        return outcome_of(read, self.path, named="" if overrides else "config.yaml")

    def _content(self, draw: random.Random) -> bytes:
        if draw.random() < 0.4:
            content = draw.choice(self.texts).encode()
        else:
            tree = draw.choice(self.trees)
            for _ in range(draw.choice([0, 1, 1, 2, 3])):
                tree = mutated_tree(draw, tree)
            try:
                content = yaml.safe_dump(tree, allow_unicode=True).encode()
            except (ValueError, yaml.YAMLError):
                content = b"seed: " + b"9" * 5000
        if draw.random() < 0.3:
            lines = content.decode().splitlines(keepends=True)
            lines.insert(draw.randint(0, len(lines)), draw.choice(_SNIPPETS))
            content = "".join(lines).encode()
        return mutated_bytes(draw, content, most=3) if draw.random() < 0.2 else content

    def _override(self, draw: random.Random) -> str:
        key = draw.choice(
            [
                "seed",
                "data.root",
                "optimiser.lr",
                "terms.mask.weight",
                "a.b.c",
                "model",
                "",
                ".",
                "model.overrides.image",
            ]
        )
        value = draw.choice([*_SNIPPETS, *(str(odd) for odd in ODD if odd != 10**400), "[", "{a: b}"])
        return key + draw.choice(["=", "=", "=", ""]) + value
