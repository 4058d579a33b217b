"""Cross-modal attention's C++ kernels; see `_cpu_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cpu_backend
from magnet_fast.ops._view import view

_NAMES = ("image_query", "text_key", "text_value", "text_query", "image_key", "image_value")


def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments as the reference's; any strides. An empty tensor stands for the direction without values."""
    tensors, (text_mask, num_heads, scale) = laid_out(arguments[:6]), arguments[6:]
    text_mask = None if text_mask is None else text_mask.contiguous()
    image_out, text_out = results(tensors)
    _cpu_backend.extension.cross_modal_attention_forward(
        image_out=view(image_out),
        text_out=view(text_out),
        threads=torch.get_num_threads(),
        **inputs(tensors, text_mask, num_heads, scale),
    )
    like = next(tensor for tensor in tensors if tensor is not None)
    return like.new_empty(0) if image_out is None else image_out, like.new_empty(0) if text_out is None else text_out


def backward(
    grad_image_out: Tensor | None, grad_text_out: Tensor | None, *arguments: Tensor | Sequence[bool] | None
) -> list[Tensor | None]:
    """Gradients of the six tensors, None for those not wanted."""
    tensors, (text_mask, num_heads, scale, wanted) = laid_out(arguments[:6]), arguments[6:]
    text_mask = None if text_mask is None else text_mask.contiguous()
    # An empty gradient is that of a result which the call does not have.
    image = grad_image_out is not None and tensors[2] is not None
    text = grad_text_out is not None and tensors[5] is not None
    separate = tensors[3] is not None
    scores = image or (text and not separate)
    reached = (scores, scores, image, text, text, text)
    grads = [
        (tensor.new_empty if into else tensor.new_zeros)(tensor.shape) if want and tensor is not None else None
        for tensor, want, into in zip(tensors, wanted, reached, strict=True)
    ]
    if any(into and grad is not None for grad, into in zip(grads, reached, strict=True)):
        grad_outputs = laid_out((grad_image_out if image else None, grad_text_out if text else None))
        _cpu_backend.extension.cross_modal_attention_backward(
            grad_image_out=view(grad_outputs[0]),
            grad_text_out=view(grad_outputs[1]),
            threads=torch.get_num_threads(),
            **gradients(grads, reached),
            **inputs(tensors, text_mask, num_heads, scale),
        )
    return grads


def laid_out(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The kernels read tensors with any strides but the last."""
    return [
        tensor if tensor is None or tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()
        for tensor in tensors
    ]


def results(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Memory for image_out and text_out, None without the values."""
    image_query, text_key, text_value, text_query, image_key, image_value = tensors
    pixels, words = (image_query, text_key) if image_query is not None else (image_key, text_query)
    image_out = None if text_value is None else pixels.new_empty((*pixels.shape[:2], text_value.shape[2]))
    text_out = None if image_value is None else pixels.new_empty((*words.shape[:2], image_value.shape[2]))
    return image_out, text_out


def inputs(
    tensors: Sequence[Tensor | None], text_mask: Tensor | None, num_heads: int, scale: float
) -> dict[str, object]:
    """What the extensions take in both passes."""
    return {
        **{name: view(tensor) for name, tensor in zip(_NAMES, tensors, strict=True)},
        "text_mask": view(text_mask),
        "heads": num_heads,
        "scale": scale,
    }


def gradients(grads: Sequence[Tensor | None], reached: Sequence[bool]) -> dict[str, object]:
    """The gradients that something flows into, for the extensions to write."""
    return {
        f"grad_{name}": view(grad) if into else None for name, grad, into in zip(_NAMES, grads, reached, strict=True)
    }
