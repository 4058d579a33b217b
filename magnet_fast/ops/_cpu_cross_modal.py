"""Cross-modal attention's C++ kernels; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend

_NAMES = ("image_query", "text_key", "text_value", "text_query", "image_key", "image_value")
_ABSENT = (0, 0, 0)


def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments as the reference's; any strides. An empty tensor stands for the direction without values."""
    tensors, (text_mask, num_heads, scale) = _laid_out(arguments[:6]), arguments[6:]
    text_mask = None if text_mask is None else text_mask.contiguous()
    sizes = _sizes(tensors, text_mask, num_heads, scale)
    batch, like = sizes["batch"], next(tensor for tensor in tensors if tensor is not None)
    image_out = text_out = None
    if tensors[2] is not None:
        image_out = like.new_empty((batch, sizes["pixels"], sizes["text_value_width"]))
    if tensors[5] is not None:
        text_out = like.new_empty((batch, sizes["words"], sizes["image_value_width"]))
    _cpu_backend.extension.cross_modal_attention_forward(
        image_out_ptr=_address(image_out), text_out_ptr=_address(text_out), **sizes
    )
    return like.new_empty(0) if image_out is None else image_out, like.new_empty(0) if text_out is None else text_out


def backward(
    grad_image_out: Tensor | None, grad_text_out: Tensor | None, *arguments: Tensor | Sequence[bool] | None
) -> list[Tensor | None]:
    """Gradients of the six tensors, None for those not wanted."""
    tensors, (text_mask, num_heads, scale, wanted) = _laid_out(arguments[:6]), arguments[6:]
    text_mask = None if text_mask is None else text_mask.contiguous()
    # An empty gradient is that of a result which the call does not have.
    image = grad_image_out is not None and tensors[2] is not None
    text = grad_text_out is not None and tensors[5] is not None
    separate = tensors[3] is not None
    scores = image or (text and not separate)
    reached = (scores, scores, image, text, text, text)
    grads = [
        (torch.empty if into else torch.zeros)(tensor.shape, dtype=tensor.dtype)
        if want and tensor is not None
        else None
        for tensor, want, into in zip(tensors, wanted, reached, strict=True)
    ]
    if any(into and grad is not None for grad, into in zip(grads, reached, strict=True)):
        grad_outputs = _laid_out((grad_image_out if image else None, grad_text_out if text else None))
        _cpu_backend.extension.cross_modal_attention_backward(
            grad_image_out=_argument(grad_outputs[0]),
            grad_text_out=_argument(grad_outputs[1]),
            **{
                f"grad_{name}_ptr": _address(grad) if into else 0
                for name, grad, into in zip(_NAMES, grads, reached, strict=True)
            },
            **_sizes(tensors, text_mask, num_heads, scale),
        )
    return grads


def _laid_out(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The kernels read tensors with any strides but the last."""
    return [
        tensor if tensor is None or tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()
        for tensor in tensors
    ]


def _sizes(
    tensors: Sequence[Tensor | None], text_mask: Tensor | None, num_heads: int, scale: float
) -> dict[str, object]:
    image_query, text_key, text_value, text_query, image_key, image_value = tensors
    pixels, words = (image_query, text_key) if image_query is not None else (image_key, text_query)
    return {
        **{name: _argument(tensor) for name, tensor in zip(_NAMES, tensors, strict=True)},
        "text_mask_ptr": _address(text_mask),
        "batch": pixels.shape[0],
        "pixels": pixels.shape[1],
        "words": words.shape[1],
        "heads": num_heads,
        "width": pixels.shape[2],
        "text_value_width": 0 if text_value is None else text_value.shape[2],
        "image_value_width": 0 if image_value is None else image_value.shape[2],
        "scale": scale,
        "dtype": _cpu_backend.DTYPE_CODES[pixels.dtype],
        "threads": torch.get_num_threads(),
    }


def _argument(tensor: Tensor | None) -> tuple[int, int, int]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _address(tensor: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()
