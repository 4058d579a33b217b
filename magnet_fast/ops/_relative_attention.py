"""SAM's attention: positions enter by the products of queries with tables over rows and columns."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from magnet_fast.ops import (
    _autocast,
    _checks,
    _cpu_backend,
    _cpu_relative,
    _registry,
    _triton_backend,
    _triton_relative,
)
from magnet_fast.ops._binding import bind
from magnet_fast.ops._once import checked_once
from magnet_fast.ops._windows import diagonals, padded

_NAME = "relative_attention"


class RelativeSettings(NamedTuple):
    """What relative attention is told beside its tensors; csrc/common/relative_settings.h is the same in C++."""

    num_heads: int
    window_h: int
    """Of the map's height where the whole map is one window."""
    window_w: int
    scale: float
    """Factor of the similarity alone, above 0."""


@checked_once(_NAME)
def relative_attention(
    qkv: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int] | None = None,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Self-attention with decomposed relative positions, from the qkv projection of a map to a map again.

    Per head and window the logit of the query at (y, x) and the key at (y', x') is
    `scale * q k + q rel_height[y - y' + S_h - 1] + q rel_width[x - x' + S_w - 1]`, S the window's sides. A map that is
    cut into windows is padded at the bottom and right to whole ones first. No similarity is kept: memory does not grow
    with the square of the number of tokens.

    Args:
        qkv: (B, H, W, 3*C), the projection of the *unpadded* map; channels `[q | k | v]`, each num_heads * d. The last
            dimension must be contiguous, the other strides are free. float32, bfloat16, float16 or float64.
        rel_height: (2*S_h - 1, d), over the distance of rows, for all heads. The dtype of `qkv`, or float32 beside a
            bfloat16 or float16 `qkv`. Tables of another length are resized by the caller.
        rel_width: (2*S_w - 1, d), over the distance of columns, likewise.
        num_heads: number of heads; divides C.
        window_size: side of the window, or (height, width), in tokens; None: the whole map is one window.
        pad_qkv: (3*C), what the projection makes of a padded (zero) token: its bias. Padded tokens are real keys,
            padded queries are not computed. None means zeros. Dtypes as for the tables.
        scale: factor of the similarity, above 0; default d ** -0.5. The products with the tables are not scaled.

    Returns:
        (B, H, W, C) contiguous, dtype of `qkv`. Low precisions take the positions' products and the softmax in
        float32. Under autocast `qkv` is cast to autocast's dtype first.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        RuntimeError: a forced backend cannot run this; the message says why.

    Source: Kirillov et al., "Segment Anything" (arXiv 2304.02643), its released `Attention`; Li et al., "MViTv2"
    (arXiv 2112.01526), section 4.1.
    """
    arguments = _prepare(
        qkv, rel_height, rel_width, num_heads=num_heads, window_size=window_size, pad_qkv=pad_qkv, scale=scale
    )
    backend = _registry.choose(_NAME, arguments)
    with _autocast.disabled(qkv):
        if backend == "reference":
            return relative_attention_reference(*arguments)
        return _run(*arguments, backend)


def relative_attention_reference(
    qkv: Tensor, rel_height: Tensor, rel_width: Tensor, pad_qkv: Tensor | None, *settings
) -> Tensor:
    """The operator in plain differentiable PyTorch: what every kernel must agree with.

    Args:
        qkv, rel_height, rel_width, pad_qkv: as `relative_attention`'s.
        *settings: those of `RelativeSettings`.
    """
    num_heads, window_h, window_w, scale = RelativeSettings(*settings)
    batch, height, width, channels = qkv.shape
    d = channels // 3 // num_heads
    rows, columns = -(-height // window_h), -(-width // window_w)
    computed = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    rel_height = rel_height.to(computed)
    if pad_qkv is not None and (height, width) == (rows * window_h, columns * window_w):
        # Nothing is padded: the padding token still gets a gradient, of zeros, as it does from the kernels.
        rel_height = rel_height + pad_qkv[:0].sum()

    # (B, rows, wh, columns, ww, 3, h, d) -> three of (B, rows, columns, h, wh, ww, d), with one copy.
    x = padded(qkv, pad_qkv, rows * window_h, columns * window_w)
    x = x.unflatten(3, (3, num_heads, d)).unflatten(2, (columns, window_w)).unflatten(1, (rows, window_h))
    query, key, value = x.permute(5, 0, 1, 3, 6, 2, 4, 7).contiguous().unbind(0)

    # The scale goes on the query: in float16 unscaled products could overflow.
    similarity = (query.flatten(-3, -2) * scale) @ key.flatten(-3, -2).transpose(-2, -1)
    similarity = similarity.unflatten(-1, (window_h, window_w)).unflatten(-3, (window_h, window_w)).to(computed)
    # diagonals: (d, S, S), of where query i lies relative to key j.
    by_row = torch.einsum("...yxd,dyz->...yxz", query.to(computed), diagonals(rel_height.t(), window_h))
    by_column = torch.einsum("...yxd,dxz->...yxz", query.to(computed), diagonals(rel_width.to(computed).t(), window_w))
    logits = similarity + by_row.unsqueeze(-1) + by_column.unsqueeze(-2)
    out = logits.flatten(-2).flatten(-3, -2).softmax(-1).to(qkv.dtype) @ value.flatten(-3, -2)

    out = out.unflatten(-2, (window_h, window_w)).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, rows * window_h, columns * window_w, num_heads * d)[:, :height, :width].contiguous()


def _prepare(
    qkv: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int] | None = None,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> tuple:
    """Check the public arguments and return those of `relative_attention_reference`."""
    num_heads, d = _checks.qkv_map(qkv, num_heads)
    channels = num_heads * d
    window = (qkv.shape[1], qkv.shape[2]) if window_size is None else window_size
    window_h, window_w = _checks.int_pair(window, "window_size", 1)
    scale = d**-0.5 if scale is None else _checks.positive_number(scale, "scale")

    whose = "the whole map" if window_size is None else "window"
    for table, name, side in ((rel_height, "rel_height", window_h), (rel_width, "rel_width", window_w)):
        axis = name.removeprefix("rel_")
        _checks.floating_tensor(table, name, 2, f"(2*{axis} - 1, d)")
        _checks.exact_shape(
            table, name, (2 * side - 1, d), f"for {whose} {{}} and {{}} channels a head", (window_h, window_w), d
        )
        _checks.same_device(table, name, qkv, "qkv")
    if pad_qkv is not None:
        _checks.floating_tensor(pad_qkv, "pad_qkv", 1, "(3*C)")
        _checks.exact_shape(pad_qkv, "pad_qkv", (3 * channels,), "the last dimension of qkv")
        _checks.same_device(pad_qkv, "pad_qkv", qkv, "qkv")

    # The tables and the padding token may stay in float32: they are small.
    qkv = _autocast.cast(qkv)
    small = [None if tensor is None else _autocast.cast_low(tensor) for tensor in (rel_height, rel_width, pad_qkv)]
    for tensor, name in zip(small, ("rel_height", "rel_width", "pad_qkv"), strict=True):
        if tensor is not None:
            _checks.same_dtype(tensor, name, qkv, "qkv", or_float32=True)
    return qkv, *small, *RelativeSettings(num_heads, window_h, window_w, scale)


_DIFFERENTIABLE = (0, 1, 2, 3)

_run = bind(
    _NAME,
    tensors=("Tensor qkv", "Tensor rel_height", "Tensor rel_width", "Tensor? pad_qkv"),
    settings=tuple(f"{kind.__name__} {name}" for name, kind in get_type_hints(RelativeSettings).items()),
    outputs=1,
    fake=lambda qkv, *rest: qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3)),
    differentiable=_DIFFERENTIABLE,
    reference=relative_attention_reference,
)

_registry.register_operator(_NAME, _prepare)
_registry.register(
    _NAME,
    "cpu",
    _cpu_relative.forward,
    _cpu_relative.backward,
    _cpu_backend.supports,
    _cpu_backend.missing,
    _cpu_backend.passed_over,
)
_registry.register(
    _NAME,
    "triton",
    _triton_relative.forward,
    _triton_relative.backward,
    _triton_relative.supports,
    _triton_backend.missing,
    _triton_backend.passed_over,
)
