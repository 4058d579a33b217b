"""Cross-modal attention's CUDA kernels; see `_cuda_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magnet_fast.ops import _cuda_backend
from magnet_fast.ops._cpu_cross_modal import _NAMES, _argument, _laid_out

_MOST_WORDS, _MOST_HEAD_DIM = 64, 1024


def supports(*arguments: Tensor | None) -> str | None:
    """None when the kernels can run this, else the reason why not."""
    tensors, num_heads = arguments[:6], arguments[7]
    words = next(tensor.shape[1] for tensor in tensors[1:4:2] if tensor is not None)
    if words > _MOST_WORDS:
        return f"{words} words are not supported, at most {_MOST_WORDS}"
    widest = max(tensor.shape[2] for tensor in tensors if tensor is not None) // num_heads
    if widest > _MOST_HEAD_DIM:
        return f"heads of {widest} channels are not supported, at most {_MOST_HEAD_DIM}"
    return _cuda_backend.supports(*arguments)


def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments as the reference's; any strides. An empty tensor stands for the direction without values."""
    tensors, (text_mask, num_heads, scale) = _laid_out(arguments[:6]), arguments[6:]
    sizes = _sizes(tensors, num_heads)
    like = next(tensor for tensor in tensors if tensor is not None)
    image_out = text_out = None
    if tensors[2] is not None:
        image_out = like.new_empty((sizes["batch"], sizes["pixels"], sizes["text_value_width"]))
    if tensors[5] is not None:
        text_out = like.new_empty((sizes["batch"], sizes["words"], sizes["image_value_width"]))
    _call(
        "forward",
        tensors,
        text_mask,
        scale,
        sizes,
        image_out_ptr=_cuda_backend.address(image_out),
        text_out_ptr=_cuda_backend.address(text_out),
    )
    return like.new_empty(0) if image_out is None else image_out, like.new_empty(0) if text_out is None else text_out


def backward(
    grad_image_out: Tensor | None, grad_text_out: Tensor | None, *arguments: Tensor | Sequence[bool] | None
) -> list[Tensor | None]:
    """Gradients of the six tensors, None for those not wanted."""
    tensors, (text_mask, num_heads, scale, wanted) = _laid_out(arguments[:6]), arguments[6:]
    sizes = _sizes(tensors, num_heads)
    # An empty gradient is that of a result which the call does not have.
    image = grad_image_out is not None and tensors[2] is not None
    text = grad_text_out is not None and tensors[5] is not None
    separate = tensors[3] is not None
    scores = image or (text and not separate)
    reached = (scores, scores, image, text, text, text)
    grads = [
        (torch.empty if into else torch.zeros)(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if want and tensor is not None
        else None
        for tensor, want, into in zip(tensors, wanted, reached, strict=True)
    ]
    if any(into and grad is not None for grad, into in zip(grads, reached, strict=True)):
        grad_outputs = _laid_out((grad_image_out if image else None, grad_text_out if text else None))
        _call(
            "backward",
            tensors,
            text_mask,
            scale,
            sizes,
            grad_image_out=_argument(grad_outputs[0]),
            grad_text_out=_argument(grad_outputs[1]),
            **{
                f"grad_{name}_ptr": _cuda_backend.address(grad) if into else 0
                for name, grad, into in zip(_NAMES, grads, reached, strict=True)
            },
        )
    return grads


def _call(
    which: str,
    tensors: Sequence[Tensor | None],
    text_mask: Tensor | None,
    scale: float,
    sizes: dict[str, int],
    **arguments: object,
) -> None:
    like = next(tensor for tensor in tensors if tensor is not None)
    text_mask = None if text_mask is None else text_mask.contiguous()
    place = _cuda_backend.place(like)
    size = _cuda_backend.extension.cross_modal_attention_workspace(device=place["device"], **sizes)
    workspace = _cuda_backend.workspace(size, like)
    getattr(_cuda_backend.extension, f"cross_modal_attention_{which}")(
        **place,
        **{name: _argument(tensor) for name, tensor in zip(_NAMES, tensors, strict=True)},
        text_mask_ptr=_cuda_backend.address(text_mask),
        scale=scale,
        workspace_ptr=workspace.data_ptr(),
        workspace_bytes=size,
        **sizes,
        **arguments,
    )


def _sizes(tensors: Sequence[Tensor | None], num_heads: int) -> dict[str, int]:
    image_query, text_key, text_value, text_query, image_key, image_value = tensors
    pixels, words = (image_query, text_key) if image_query is not None else (image_key, text_query)
    return {
        "batch": pixels.shape[0],
        "pixels": pixels.shape[1],
        "words": words.shape[1],
        "heads": num_heads,
        "width": pixels.shape[2],
        "text_value_width": 0 if text_value is None else text_value.shape[2],
        "image_value_width": 0 if image_value is None else image_value.shape[2],
    }
