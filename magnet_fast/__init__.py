"""Fast referring image segmentation: MagNet and its family on fused operators.

Importing the package is cheap and works on any machine: its parts (``magnet_fast.ops``,
``magnet_fast.models``, ``magnet_fast.Segmenter`` and others) are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import Segmenter

__version__ = "0.1.0"

_PARTS = ("data", "evaluation", "inference", "losses", "models", "ops", "training", "visualize")

__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "Segmenter":
        from .inference import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, "Segmenter"})
