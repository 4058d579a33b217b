"""Fast referring image segmentation: systems made of small parts, on fused operators.

Importing the package is cheap and works on any machine: its parts (`magnet_fast.ops`, `magnet_fast.models`,
`magnet_fast.Segmenter`, `magnet_fast.accelerate` and others) are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magnet_fast.fast import accelerate, restore
    from magnet_fast.inference import Segmenter

__version__ = "0.1.0"

_PARTS = (
    "batch", "checkpoints", "data", "editing", "evaluation", "fast", "inference", "models", "ops", "training",
    "visualize",
)  # fmt: skip

_EXPORTS = {"Segmenter": "inference", "accelerate": "fast", "restore": "fast"}

__all__ = ["Segmenter", "__version__", "accelerate", "restore"]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *_EXPORTS})
