"""Work that belongs on the CPU, whatever default device PyTorch was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make the CPU the default device, inside `with` or as a decorator.

    A program that says `torch.set_default_device("cuda")` moves every tensor that is made without a device. What this
    package makes has its device said; this is for what others make in between: PyTorch's loaders and optimisers, timm,
    transformers.
    """
    if torch.get_default_device().type == "cpu":  # a default device, once set, is asked about every function
        yield
    else:
        with torch.device("cpu"):
            yield
