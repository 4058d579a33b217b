"""Attention between pixels and words, both directions from one pass over the pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magnet_fast.ops import (
    _autocast,
    _checks,
    _cpu_backend,
    _cpu_cross_modal,
    _cuda_backend,
    _cuda_cross_modal,
    _registry,
    _triton_backend,
    _triton_cross_modal,
)
from magnet_fast.ops._binding import bind
from magnet_fast.ops._once import checked_once

_NAME = "cross_modal_attention"


def cross_modal_attention(
    image_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_query: Tensor | None = None,
    image_key: Tensor | None = None,
    image_value: Tensor | None = None,
    *,
    text_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Pixels attend to words and words attend to pixels. Per head:

        image_out = softmax_over_words(scale * image_query @ text_key^T) @ text_value
        text_out  = softmax_over_pixels(scale * text_query @ image_key^T) @ image_value

    Forms, by what is given:

    * *separate similarity* (the released MagNet): all six tensors;
    * *shared similarity* (X-MHA of the MagNet paper): `text_query` and `image_key` left None; the similarity of
      `image_query` and `text_key` is computed once and used row-wise and column-wise;
    * *pixels only* (LAVT's PWAM): no `image_value` (and neither `text_query` nor `image_key`);
    * *words only* (words, or mask queries, reading the image): no `text_value`; the similarity is either shared
      (`image_query` and `text_key`) or separate (`text_query` and `image_key`), and the other pair is None.

    A tensor that the form would not use is an error, not ignored.

    Args:
        image_query: (B, P, C) for P pixels.
        text_key: (B, T, C) for T words.
        text_value: (B, T, Cv); Cv may differ from C.
        text_query: (B, T, C).
        image_key: (B, P, C).
        image_value: (B, P, Cw); Cw may differ from C and Cv.
        text_mask: (B, T) bool, True for a word. A masked word is no key, and its row of `text_out` is 0.
            A sentence without any word gives zeros and zero gradients. What masked rows hold is never
            read, be it NaN.
        num_heads: number of heads; divides every width.
        scale: factor of the similarity, above 0; default d ** -0.5 with d = C / num_heads.

    Returns:
        `(image_out (B, P, Cv), text_out (B, T, Cw))`; the direction without values is None. float32,
        bfloat16, float16 or float64 as the inputs, which share one dtype; low precisions take the softmax
        in float32. Under autocast all are cast to autocast's dtype first.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or one too many or
            too few.
        RuntimeError: a forced backend cannot run this; the message says why.

    Source: MagNet (arXiv 2312.12198), after GLIP's X-MHA; LAVT (arXiv 2112.02244), PWAM.
    """
    image_out, text_out = _attend(
        image_query,
        text_key,
        text_value,
        text_query,
        image_key,
        image_value,
        text_mask=text_mask,
        num_heads=num_heads,
        scale=scale,
    )
    return image_out if text_value is not None else None, text_out if image_value is not None else None


@checked_once(_NAME)
def _attend(*args: Tensor | None, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Both directions; one without values is an empty tensor, or None from the reference."""
    arguments = _prepare(*args, **kwargs)
    backend = _registry.choose(_NAME, arguments)
    with _autocast.disabled(next(t for t in arguments[:6] if t is not None)):
        if backend == "reference":
            return cross_modal_attention_reference(*arguments)
        return _run(*arguments, backend)


def cross_modal_attention_reference(
    image_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_query: Tensor | None,
    image_key: Tensor | None,
    image_value: Tensor | None,
    text_mask: Tensor | None,
    num_heads: int,
    scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The operator in plain differentiable PyTorch: what every kernel must agree with."""
    absent = None if text_mask is None else ~text_mask.unsqueeze(-1)  # (B, T, 1)
    text_key, text_value, text_query = (_blank(t, absent) for t in (text_key, text_value, text_query))
    image_out = text_out = None

    shared = None
    if image_query is not None:
        # (B, h, T, P), words first: both softmaxes then run over memory that is contiguous for the larger
        # side.
        shared = _similarity(text_key, image_query, num_heads, scale)
    if text_value is not None:
        weights = shared
        if absent is not None:
            # The lowest finite number, not -inf: a sentence with no word must not become NaN. Its weights
            # (uniform) meet values that are all zero, and the fill stops the gradient of its similarity.
            weights = weights.masked_fill(absent.unsqueeze(1), torch.finfo(weights.dtype).min)
        weights = weights.softmax(-2).to(text_value.dtype)
        image_out = _join(weights.transpose(-2, -1) @ _split(text_value, num_heads))
    if image_value is not None:
        weights = shared if text_query is None else _similarity(text_query, image_key, num_heads, scale)
        weights = weights.softmax(-1).to(image_value.dtype)
        text_out = _blank(_join(weights @ _split(image_value, num_heads)), absent)
    return image_out, text_out


def _similarity(left: Tensor, right: Tensor, num_heads: int, scale: float) -> Tensor:
    """(B, M, C), (B, N, C) -> (B, h, M, N) in the softmax's precision. The scale goes on the smaller side
    first, so that float16 products cannot overflow where the scaled ones would not."""
    product = (_split(left, num_heads) * scale) @ _split(right, num_heads).transpose(-2, -1)
    return product if product.dtype == torch.float64 else product.float()


def _split(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) -> (B, h, N, d)"""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, h*d)"""
    return x.transpose(1, 2).flatten(2).contiguous()


def _blank(x: Tensor | None, absent: Tensor | None) -> Tensor | None:
    """Zero the rows of masked words."""
    return x if x is None or absent is None else x.masked_fill(absent, 0.0)


def _prepare(
    image_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_query: Tensor | None = None,
    image_key: Tensor | None = None,
    image_value: Tensor | None = None,
    *,
    text_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
) -> tuple:
    """Check the public arguments and return those of `cross_modal_attention_reference`."""
    given = {
        "image_query": image_query,
        "text_key": text_key,
        "text_value": text_value,
        "text_query": text_query,
        "image_key": image_key,
        "image_value": image_value,
    }
    _check_form({name for name, value in given.items() if value is not None})
    tensors = {name: value for name, value in given.items() if value is not None}
    first = "image_query" if image_query is not None else "text_query"
    for name, value in tensors.items():
        side = "T" if name.startswith("text") else "P"
        _checks.floating_tensor(value, name, 3, f"(B, {side}, C)")
    for name, value in tensors.items():
        _checks.same_device(value, name, tensors[first], first)
        if value.shape[0] != tensors[first].shape[0]:
            raise ValueError(
                f"{name}: expected the batch of {first}, {tensors[first].shape[0]}, got shape {tuple(value.shape)}"
            )
    for one, other, dimension, what in (
        ("image_query", "text_key", 2, "width"),
        ("text_query", "image_key", 2, "width"),
        ("text_key", "text_value", 1, "number of words"),
        ("text_key", "text_query", 1, "number of words"),
        ("image_query", "image_value", 1, "number of pixels"),
        ("image_key", "image_value", 1, "number of pixels"),
    ):
        if one in tensors and other in tensors and tensors[one].shape[dimension] != tensors[other].shape[dimension]:
            raise ValueError(
                f"{other}: expected the {what} of {one}, {tensors[one].shape[dimension]}, "
                f"got shape {tuple(tensors[other].shape)}"
            )
    num_heads = _checks.positive_int(num_heads, "num_heads")
    for name, value in tensors.items():
        _checks.head_width(value.shape[2], num_heads, name)
    if scale is None:
        scale = (tensors[first].shape[2] // num_heads) ** -0.5
    else:
        scale = _checks.positive_number(scale, "scale")
    if text_mask is not None:
        words = text_key if text_key is not None else text_query
        _check_mask(text_mask, words)
    cast = {name: _autocast.cast(value) for name, value in tensors.items()}
    for name, value in cast.items():
        _checks.same_dtype(value, name, cast[first], first)
    return (*(cast.get(name) for name in given), text_mask, num_heads, scale)


def _check_form(given: set[str]) -> None:
    if not given & {"text_value", "image_value"}:
        raise ValueError("text_value, image_value: expected at least one of them, got neither")
    if ("text_query" in given) != ("image_key" in given):
        raise ValueError("text_query, image_key: expected both (separate similarity) or neither (shared), got one")
    if ("image_query" in given) != ("text_key" in given):
        raise ValueError("image_query, text_key: expected both or neither, got one")
    separate = "text_query" in given
    if "text_value" in given and "image_query" not in given:
        raise ValueError("image_query, text_key: expected beside text_value, got None")
    if separate and "image_value" not in given:
        raise ValueError("image_value: expected beside text_query and image_key, which nothing else uses, got None")
    if "image_value" in given and not separate and "image_query" not in given:
        raise ValueError("image_value: expected text_query and image_key, or image_query and text_key, beside it")
    if separate and "image_query" in given and "text_value" not in given:
        raise ValueError("text_value: expected beside image_query and text_key, which nothing else uses, got None")


def _check_mask(text_mask: Tensor, words: Tensor) -> None:
    if not isinstance(text_mask, Tensor):
        raise TypeError(f"text_mask: expected a bool tensor (B, T), got {type(text_mask).__name__}")
    _checks.dense(text_mask, "text_mask")
    if text_mask.dtype != torch.bool:
        raise TypeError(f"text_mask: expected bool (True for a word), got {_checks.dtype_name(text_mask.dtype)}")
    _checks.exact_shape(text_mask, "text_mask", words.shape[:2], "batch and words")
    _checks.same_device(text_mask, "text_mask", words, "the text tensors")


def _fake(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    image_query, text_key, text_value, text_query, image_key, image_value = arguments[:6]
    like = image_query if image_query is not None else text_query
    image_out, text_out = like.new_empty(0), like.new_empty(0)
    if text_value is not None:
        image_out = like.new_empty((*image_query.shape[:2], text_value.shape[2]))
    if image_value is not None:
        words = text_key if text_query is None else text_query
        text_out = like.new_empty((*words.shape[:2], image_value.shape[2]))
    return image_out, text_out


_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5)

_run = bind(
    _NAME,
    tensors=(
        "Tensor? image_query",
        "Tensor? text_key",
        "Tensor? text_value",
        "Tensor? text_query",
        "Tensor? image_key",
        "Tensor? image_value",
        "Tensor? text_mask",
    ),
    settings=("int num_heads", "float scale"),
    outputs=2,
    fake=_fake,
    differentiable=_DIFFERENTIABLE,
    reference=cross_modal_attention_reference,
)

_registry.register_operator(_NAME, _prepare)
_registry.register(
    _NAME,
    "cpu",
    _cpu_cross_modal.forward,
    _cpu_cross_modal.backward,
    _cpu_backend.supports,
    _cpu_backend.missing,
    _cpu_backend.passed_over,
)
_registry.register(
    _NAME,
    "triton",
    _triton_cross_modal.forward,
    _triton_cross_modal.backward,
    _triton_cross_modal.supports,
    _triton_backend.missing,
    _triton_backend.passed_over,
)
_registry.register(
    _NAME,
    "cuda",
    _cuda_cross_modal.forward,
    _cuda_cross_modal.backward,
    _cuda_cross_modal.supports,
    _cuda_backend.missing,
    _cuda_backend.passed_over,
)
