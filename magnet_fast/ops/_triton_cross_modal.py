"""Cross-modal attention's Triton kernels; see `_triton_backend` for what they need.

The kernels are imported when they first run: Triton takes long to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from magnet_fast.ops import _triton_backend

if TYPE_CHECKING:
    from magnet_fast.kernels._cross_modal_launch import Similarity

MOST_WORDS = 64
WIDEST_HEAD = 1024
# A tile has up to 128 rows.
_LARGEST_STRIDE = 2**24


def supports(*arguments: object) -> str | None:
    """None when the kernels can run the call, else the reason why not."""
    image_query, text_key, text_value, text_query, _, image_value = arguments[:6]
    num_heads = arguments[7]
    words = (text_key if text_key is not None else text_query).shape[1]
    if words > MOST_WORDS:
        return f"{words} words are not supported, {MOST_WORDS} at most"
    query = image_query if image_query is not None else text_query
    widest = max(tensor.shape[2] for tensor in (query, text_value, image_value) if tensor is not None) // num_heads
    if widest > WIDEST_HEAD:
        return f"{widest} channels of a head are not supported, {WIDEST_HEAD} at most"
    return _triton_backend.supports(*arguments)


def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments as the reference's; any strides. An empty tensor stands for the direction without values."""
    from magnet_fast.kernels import _runtime, cross_modal_attention

    like, outs = next(tensor for tensor in arguments if tensor is not None), [None, None]
    with _runtime.on_device(like):
        for similarity, _ in _similarities(*arguments, backward=False):
            found = cross_modal_attention.forward(similarity)
            outs = [out if new is None else new for out, new in zip(outs, found, strict=True)]
    image_out, text_out = (like.new_empty(0) if out is None else out for out in outs)
    return image_out, text_out


def backward(
    grad_image_out: Tensor | None, grad_text_out: Tensor | None, *arguments: Tensor | Sequence[bool] | None
) -> list[Tensor | None]:
    """Gradients of the six tensors, None for those not wanted."""
    from magnet_fast.kernels import _runtime, cross_modal_attention

    *arguments, wanted = arguments
    tensors, grads = arguments[:6], [None] * 6
    with _runtime.on_device(next(tensor for tensor in tensors if tensor is not None)):
        for similarity, places in _similarities(*arguments, backward=True):
            # An empty gradient is that of a result which the call does not have.
            image = grad_image_out if similarity.text_value is not None else None
            text = grad_text_out if similarity.image_value is not None else None
            scores = image is not None or text is not None
            reached = (scores, scores, image is not None, text is not None)
            want = [wanted[place] and into for place, into in zip(places, reached, strict=True)]
            if any(want):
                found = cross_modal_attention.backward(
                    similarity, _channels_together(image), _channels_together(text), want
                )
                for place, into, grad in zip(places, want, found, strict=True):
                    if into:
                        grads[place] = grad
    return [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if want and tensor is not None and grad is None
        else grad
        for tensor, want, grad in zip(tensors, wanted, grads, strict=True)
    ]


def _similarities(
    image_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_query: Tensor | None,
    image_key: Tensor | None,
    image_value: Tensor | None,
    text_mask: Tensor | None,
    num_heads: int,
    scale: float,
    *,
    backward: bool,
) -> list[tuple[Similarity, tuple[int, ...]]]:
    """What the kernels take: one similarity for both directions, or one for each; and where the tensors of each (pixel,
    word, text_value, image_value) stand among the operator's."""
    from magnet_fast.kernels._cross_modal_launch import Similarity

    def similarity(*tensors: Tensor | None) -> Similarity:
        mask = None if text_mask is None else text_mask.contiguous().view(torch.uint8)
        return Similarity(*map(_channels_together, tensors), mask, num_heads, scale, backward)

    if text_query is None:
        return [(similarity(image_query, text_key, text_value, image_value), (0, 1, 2, 5))]
    found = [(similarity(image_key, text_query, None, image_value), (4, 3, 2, 5))]
    if image_query is not None:
        found.append((similarity(image_query, text_key, text_value, None), (0, 1, 2, 5)))
    return found


def _channels_together(tensor: Tensor | None) -> Tensor | None:
    """The kernels read tensors with any strides but the last, if a tile of rows is within 32 bits."""
    if tensor is None or (tensor.stride(2) == 1 or tensor.shape[2] == 1) and tensor.stride(1) < _LARGEST_STRIDE:
        return tensor
    return tensor.contiguous()
