"""Random and mutated inputs for everything that reads what comes from outside.

    python -m tests.fuzz TARGET|all COUNT [SEED] [--out FILE]

A target is a module of this folder with a `Target`. Its inputs are numbered; each is made of the seed and its number
alone, so that `--first NUMBER` with a count of 1 makes it again. SECURITY.md says what must hold for every one.
"""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

TARGETS = (
    "annotations", "records", "pickles", "released", "safetensors", "checkpoints", "vocabularies", "configurations",
    "images", "imports", "masks", "operators",
)  # fmt: skip


def target_class(name: str) -> type[Target]:
    """The class of a target; KeyError for an unknown name."""
    if name not in TARGETS:
        raise KeyError(name)
    return importlib.import_module(f"tests.fuzz.{name}").FuzzTarget
