"""Referring-expression data: REFER's files, embedded scenes, transforms and the tokenizer."""

from __future__ import annotations

import importlib

_HOMES = {
    "ExpressionDataset": "dataset",
    "MixedDataset": "dataset",
    "Ref": "datasets.reader",
    "Refer": "datasets.refer",
    "Sentence": "datasets.reader",
    "TokenHider": "hidden_tokens",
    "Tokenizer": "tokenizers",
    "import_data": "importing",
    "open_fit": "transforms",
    "open_reader": "datasets",
    "open_tokenizer": "tokenizers",
    "prepare_image": "transforms",
    "prepare_mask": "transforms",
    "write_scenes": "scenes",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import on first use: drawing scenes needs neither torch nor tokenizers."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
