"""Cross-modal attention's CUDA kernels; see `_cuda_backend` for the extension that holds them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from magnet_fast.ops import _cuda_backend
from magnet_fast.ops._cpu_cross_modal import gradients, inputs, laid_out, results
from magnet_fast.ops._view import view

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
    tensors = laid_out(arguments[:6])
    image_out, text_out = results(tensors)
    _call("forward", tensors, arguments[6:], image_out=view(image_out), text_out=view(text_out))
    like = next(tensor for tensor in tensors if tensor is not None)
    return like.new_empty(0) if image_out is None else image_out, like.new_empty(0) if text_out is None else text_out


def backward(
    grad_image_out: Tensor | None, grad_text_out: Tensor | None, *arguments: Tensor | Sequence[bool] | None
) -> list[Tensor | None]:
    """Gradients of the six tensors, None for those not wanted."""
    tensors, (*rest, wanted) = laid_out(arguments[:6]), arguments[6:]
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
        _call(
            "backward",
            tensors,
            rest,
            grad_image_out=view(grad_outputs[0]),
            grad_text_out=view(grad_outputs[1]),
            **gradients(grads, reached),
        )
    return grads


def _call(which: str, tensors: Sequence[Tensor | None], rest: Sequence[object], **arguments: object) -> None:
    """`rest`: the mask and the settings, as the operator's own."""
    text_mask, num_heads, scale = rest
    text_mask = None if text_mask is None else text_mask.contiguous()
    like = next(tensor for tensor in tensors if tensor is not None)
    given = {**_cuda_backend.place(like), **inputs(tensors, text_mask, num_heads, scale)}
    workspace = _cuda_backend.workspace(_cuda_backend.extension.cross_modal_attention_workspace(**given), like)
    run = getattr(_cuda_backend.extension, f"cross_modal_attention_{which}")
    run(workspace=view(workspace), **given, **arguments)
