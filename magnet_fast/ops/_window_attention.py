"""Swin attention over (shifted) windows without the data movement."""

from __future__ import annotations

import torch
from torch import Tensor

from magnet_fast.ops import (
    _autocast,
    _checks,
    _cpu_backend,
    _cpu_window,
    _cuda_backend,
    _cuda_window,
    _registry,
    _triton_backend,
    _triton_window,
)
from magnet_fast.ops._binding import bind
from magnet_fast.ops._once import checked_once
from magnet_fast.ops._window_settings import SCHEMA, WindowSettings
from magnet_fast.ops._windows import diagonals, padded

_NAME = "window_attention"


@checked_once(_NAME)
def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    pad_first: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Self-attention in (shifted) windows, straight from the qkv projection of a map to a map again.

    The map is padded at the bottom and right to whole windows, rolled by `-shift`, cut into windows, attended with a
    relative position bias, and put together again: `softmax(scale * q k^T + bias) v` per head and window. After a
    shift, tokens that were not neighbours before the roll do not see each other.

    Args:
        qkv: (B, H, W, 3*C), the projection of the *unpadded, unshifted* map; channels `[q | k | v]`,
            each num_heads * d. The last dimension must be contiguous, the other strides are free. float32,
            bfloat16, float16 or float64.
        bias_table: ((2*window_h - 1) * (2*window_w - 1), num_heads), the relative position bias table of
            Swin v1. The dtype of `qkv`, or float32 beside a bfloat16 or float16 `qkv`.
        num_heads: number of heads; divides C.
        window_size: side of the window, or (height, width), in tokens.
        shift: cyclic shift, or (vertical, horizontal); 0 <= shift < window_size.
        pad_qkv: (3*C), what the projection makes of a padded (zero) token: its bias. Padded tokens are
            real keys. None means zeros. The gradient that reaches padded keys and values goes here. Dtypes
            as for `bias_table`.
        scale: factor of the similarity, above 0; default d ** -0.5.
        pad_first: True pads and then rolls the padded map (released Swin and MagNet, LAVT, transformers,
            torchvision); False rolls and then pads (timm). They differ only where there is both a shift
            and padding.
        dropout: must be 0: attention dropout is not offered.

    Returns:
        (B, H, W, C) contiguous, dtype of `qkv`. Low precisions take the softmax in float32. Under
        autocast `qkv` is cast to autocast's dtype first.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message
            names it.
        RuntimeError: a forced backend cannot run this; the message says why.

    Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2; padding and order as in the
    codes named above.
    """
    arguments = _prepare(
        qkv,
        bias_table,
        num_heads=num_heads,
        window_size=window_size,
        shift=shift,
        pad_qkv=pad_qkv,
        scale=scale,
        pad_first=pad_first,
        dropout=dropout,
    )
    backend = _registry.choose(_NAME, arguments)
    with _autocast.disabled(qkv):
        if backend == "reference":
            return window_attention_reference(*arguments)
        return _run(*arguments, backend)


def window_attention_reference(
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    *settings,
) -> Tensor:
    """The operator in plain differentiable PyTorch: what every kernel must agree with.

    Args:
        qkv, bias_table, pad_qkv: as `window_attention`'s.
        *settings: those of `WindowSettings`.
    """
    num_heads, window_h, window_w, shift_h, shift_w, scale, pad_first = WindowSettings(*settings)
    batch, height, width, channels = qkv.shape
    d = channels // 3 // num_heads
    rows, columns = -(-height // window_h), -(-width // window_w)
    padded_h, padded_w = rows * window_h, columns * window_w
    windows, tokens = batch * rows * columns, window_h * window_w
    shifted = bool(shift_h or shift_w)

    x = qkv
    if shifted and not pad_first:
        x = torch.roll(x, (-shift_h, -shift_w), (1, 2))
    x = padded(x, pad_qkv, padded_h, padded_w)
    if shifted and pad_first:
        x = torch.roll(x, (-shift_h, -shift_w), (1, 2))

    # (B, rows, wh, columns, ww, 3, h, d) -> three of (B * rows * columns, h, N, d), with one copy.
    x = x.unflatten(3, (3, num_heads, d)).unflatten(2, (columns, window_w)).unflatten(1, (rows, window_h))
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, windows, num_heads, tokens, d)
    query, key, value = x.unbind(0)

    # The scale goes on the query: in float16 unscaled products could overflow.
    similarity = (query * scale) @ key.transpose(-2, -1)
    computed = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    bias_table = bias_table.to(computed)
    if pad_qkv is not None and (height, width) == (padded_h, padded_w):
        # Nothing is padded: the padding token still gets a gradient, of zeros, as it does from the kernels.
        bias_table = bias_table + pad_qkv[:0].sum()
    bias = _relative_position_bias(bias_table, window_h, window_w)
    if shifted:
        bias = bias + _region_mask(rows, columns, window_h, window_w, shift_h, shift_w, bias)
        similarity = similarity.unflatten(0, (batch, rows * columns))
    similarity = (similarity.to(computed) + bias).view(windows, num_heads, tokens, tokens)
    out = similarity.softmax(-1).to(qkv.dtype) @ value

    out = out.unflatten(2, (window_h, window_w)).unflatten(0, (batch, rows, columns))
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, padded_h, padded_w, num_heads * d)
    if shifted and pad_first:
        out = torch.roll(out, (shift_h, shift_w), (1, 2))
    out = out[:, :height, :width]
    if shifted and not pad_first:
        out = torch.roll(out, (shift_h, shift_w), (1, 2))
    return out.contiguous()


def _relative_position_bias(table: Tensor, window_h: int, window_w: int) -> Tensor:
    """((2*wh-1) * (2*ww-1), h) -> (h, N, N): the entry of where query i lies relative to key j.

    By pad-and-reshape rather than by an index: nothing to cache, and the gradient is a plain sum, which is
    deterministic on every device (the backward of indexing adds with atomics on several threads).
    """
    x = table.t().unflatten(1, (2 * window_h - 1, 2 * window_w - 1))
    x = diagonals(x, window_w)  # (h, 2*wh-1, ww, ww)
    x = diagonals(x.permute(0, 2, 3, 1), window_h)  # (h, ww_i, ww_j, wh_i, wh_j)
    tokens = window_h * window_w
    return x.permute(0, 3, 1, 4, 2).reshape(-1, tokens, tokens)


def _region_mask(
    rows: int, columns: int, window_h: int, window_w: int, shift_h: int, shift_w: int, like: Tensor
) -> Tensor:
    """(rows * columns, 1, N, N): 0 where query and key lie in the same region of the rolled map, -inf
    elsewhere.

    Of Swin's three regions an axis, the first ends where the last window begins; so within a window only
    the cut at `length - shift` separates anything. A token always sees itself: no row is all -inf.
    """
    y = torch.arange(rows * window_h, device=like.device) >= rows * window_h - shift_h
    x = torch.arange(columns * window_w, device=like.device) >= columns * window_w - shift_w
    y, x = y.view(rows, 1, window_h, 1), x.view(1, columns, 1, window_w)
    region = (2 * y.to(torch.int32) + x).reshape(rows * columns, window_h * window_w)
    apart = region.unsqueeze(2) != region.unsqueeze(1)
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill_(apart, float("-inf")).unsqueeze(1)


def _prepare(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    pad_first: bool = True,
    dropout: float = 0.0,
) -> tuple:
    """Check the public arguments and return those of `window_attention_reference`."""
    num_heads, d = _checks.qkv_map(qkv, num_heads)
    channels = num_heads * d
    window_h, window_w = _checks.int_pair(window_size, "window_size", 1)
    shift_h, shift_w = _checks.int_pair(shift, "shift", 0)
    if shift_h >= window_h or shift_w >= window_w:
        raise ValueError(f"shift: expected less than window_size {(window_h, window_w)}, got {(shift_h, shift_w)}")
    if dropout:
        raise ValueError(f"dropout: attention dropout is not offered, expected 0, got {dropout}")
    if not isinstance(pad_first, bool):
        raise TypeError(f"pad_first: expected a bool, got {type(pad_first).__name__}")
    scale = d**-0.5 if scale is None else _checks.positive_number(scale, "scale")

    _checks.floating_tensor(bias_table, "bias_table", 2, "((2*window_h-1)*(2*window_w-1), num_heads)")
    entries = (2 * window_h - 1) * (2 * window_w - 1)
    _checks.exact_shape(
        bias_table,
        "bias_table",
        (entries, num_heads),
        "for window {} and {} heads",
        (window_h, window_w),
        num_heads,
    )
    _checks.same_device(bias_table, "bias_table", qkv, "qkv")
    if pad_qkv is not None:
        _checks.floating_tensor(pad_qkv, "pad_qkv", 1, "(3*C)")
        _checks.exact_shape(pad_qkv, "pad_qkv", (3 * channels,), "the last dimension of qkv")
        _checks.same_device(pad_qkv, "pad_qkv", qkv, "qkv")

    # The table and the padding token may stay in float32: they are small, and the softmax is in float32
    # anyway.
    qkv, bias_table = _autocast.cast(qkv), _autocast.cast_low(bias_table)
    _checks.same_dtype(bias_table, "bias_table", qkv, "qkv", or_float32=True)
    if pad_qkv is not None:
        pad_qkv = _autocast.cast_low(pad_qkv)
        _checks.same_dtype(pad_qkv, "pad_qkv", qkv, "qkv", or_float32=True)
    settings = WindowSettings(num_heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
    return qkv, bias_table, pad_qkv, *settings


_DIFFERENTIABLE = (0, 1, 2)

_run = bind(
    _NAME,
    tensors=("Tensor qkv", "Tensor bias_table", "Tensor? pad_qkv"),
    settings=SCHEMA,
    outputs=1,
    fake=lambda qkv, *rest: qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3)),
    differentiable=_DIFFERENTIABLE,
    reference=window_attention_reference,
)

_registry.register_operator(_NAME, _prepare)
_registry.register(
    _NAME,
    "cpu",
    _cpu_window.forward,
    _cpu_window.backward,
    _cpu_backend.supports,
    _cpu_backend.missing,
    _cpu_backend.passed_over,
)
_registry.register(
    _NAME,
    "triton",
    _triton_window.forward,
    _triton_window.backward,
    _triton_window.supports,
    _triton_backend.missing,
    _triton_backend.passed_over,
)
_registry.register(
    _NAME,
    "cuda",
    _cuda_window.forward,
    _cuda_window.backward,
    _cuda_window.supports,
    _cuda_backend.missing,
    _cuda_backend.passed_over,
)
