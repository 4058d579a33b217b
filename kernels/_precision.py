"""The precision of float32 products that need the matrix units."""

from __future__ import annotations

import torch

from . import _runtime


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s precision of float32 operands: "tf32" where torch allows it, else "tf32x3".

    That is three products of TF32 pieces, as exact as float32 but for the last bit or two. "ieee" does without the
    matrix units and holds whole operands in registers: it is slower, and tiles of more than 32 channels spill.
    """
    return "tf32" if _runtime.input_precision(dtype) == "tf32" else "tf32x3"
