"""The CUDA C++ kernels of the torch-free extension `magnet_fast._cuda`: loading it, and what goes into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from magnet_fast import _cuda as extension
except ModuleNotFoundError:
    extension, missing = None, "extension magnet_fast._cuda is not built"
except ImportError as error:
    extension, missing = None, f"extension magnet_fast._cuda cannot be loaded: {error}"
else:
    missing = None if torch.cuda.is_available() else "no CUDA GPU that this torch can use is present"
"""Why the extension cannot be used, or None."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(*arguments: object) -> str | None:
    """None when the arguments' tensors can go to the kernels, else the reason why not."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    if first.device.type != "cuda":
        return f"device {first.device.type} is not supported, CUDA tensors only"
    if first.dtype not in _DTYPES:
        return f"dtype {first.dtype} is not supported, float32, bfloat16 and float16 only"
    capability = torch.cuda.get_device_capability(first.device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def passed_over(*arguments: object) -> str | None:
    """Why it is not the first guess of `auto`: nothing has been measured on a GPU yet."""
    return "not yet measured on this GPU"


def tf32() -> bool:
    """Whether products of float32 may be of TF32 on a GPU. PyTorch raises an error where its older flag is read after
    its newer one was set; this one says what either has set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def place(like: Tensor) -> dict[str, object]:
    """Where a call on `like`'s device runs, and how it may multiply float32 numbers."""
    return {
        "device": like.device.index,
        "stream": torch.cuda.current_stream(like.device).cuda_stream,
        "tf32": tf32(),
    }


def workspace(size: int, like: Tensor) -> Tensor:
    """Memory for the kernels' partial sums, in bytes; the allocator keeps it until the stream has used it."""
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def in_dtypes_of(grads: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that the kernels sum in float32, as their tensors' dtype."""
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]
