"""How a tensor is told to the torch-free extensions: csrc/common/tensor_view.h."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.uint8: 5,
}
"""What the extensions are told of a tensor's dtype: csrc/common/elements.h."""

View = tuple[int, tuple[int, ...], tuple[int, ...], int]


def view(tensor: Tensor | None) -> View | None:
    """Address, sizes, strides in elements, and dtype; None for a tensor that is not there.

    The extensions read the memory behind it: the tensor must live until the call is over, and on a GPU until the stream
    has done it.
    """
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), DTYPE_CODES[tensor.dtype]
