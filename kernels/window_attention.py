"""Swin's window attention in one pass: a program keeps its part of one head's bias on chip and walks over many windows.

`softmax(scale * q k^T + bias) v` per window and head, read from and written to the unpadded, unshifted map; the
softmax is taken to base 2, with log2(e) folded into scale and bias. The backward pass recomputes the probabilities P:
`dV = P^T dO`, `dS = P * (dO V^T - rowsum(P * dO V^T))`, `dQ = scale * dS K`, `dK = scale * dS^T Q`, and the
bias' gradient is the sum of dS over windows, which stays on chip until the program ends. Nothing is added to with
atomics: programs write partial sums, which are added in a fixed order.

A program takes a tile of a window's N queries, and all keys in up to three pieces (144 = 64 + 64 + 16), so that few
lanes are idle; tiles are as large as the registers allow. In low precision a whole window of N <= 64 fits, and one
backward kernel gives everything. Otherwise tiles of queries give dQ and each query's sums, and then tiles of keys give
dK, dV and the bias' gradient. Tiles of one window run side by side, so that they read its tokens from the L2.

float32's operands take several times the registers (see `again`). Its kernels stream them in small equal pieces, gather
the bias for each, and add the bias' gradient up in memory, each program in a place of its own.

Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from magnet_fast.kernels._runtime import (
    Autotuner,
    dot,
    grid,
    multiprocessors,
    on_device,
    power_of_two,
    precision,
    rounded,
)
from magnet_fast.kernels._window_backward import backward_kernel, table_kernel
from magnet_fast.kernels._window_backward_tiles import backward_keys_kernel, backward_queries_kernel
from magnet_fast.kernels._window_index import (
    COUNTS,
    LOG2E,
    again,
    load_piece,
    load_tile,
    load_tokens,
    relative_bias,
    relative_logits,
    store_tokens,
    token_offsets,
    token_places,
    window_place,
)
from torch import Tensor

LARGEST_WINDOW, LARGEST_WINDOW_OF_WIDE = 256, 144
"""Tokens of a window that the kernels take: with heads of up to 32 channels, and with wider ones."""

LARGEST_IMAGE = 2**31 - 1
"""Elements that one image of a batch may span: offsets within an image have 32 bits, those of images 64."""


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    qkv,  # (B, H, W, 3 * CHANNELS), any strides but the last
    table,  # (HEADS, (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)) contiguous
    pad,  # (3 * CHANNELS) contiguous, in qkv's dtype; not read without PAD
    out,  # (B, H, W, CHANNELS) contiguous
    stride_image,
    stride_y,
    stride_x,
    height,
    width,
    rows,  # of windows
    columns,
    shift_h,
    shift_w,
    roll_h,  # the shift within what is rolled: the padded map, or the map
    roll_w,
    windows,  # B * rows * columns
    programs,  # that share the windows of one head and tile
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    KEYS_A: tl.constexpr,  # of the first piece; of each one in float32
    KEYS_B: tl.constexpr,  # of the second, or 0
    KEYS_C: tl.constexpr,  # of the third, or 0
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,  # there are padded tokens, and a pad to make them of
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * D
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    STREAMED: tl.constexpr = qkv.dtype.element_ty == tl.float32
    first_query = (tl.program_id(0) % TILES) * QUERIES
    head = tl.program_id(0) // TILES % HEADS
    geometry = (height, width, rows, columns, roll_h, roll_w, shift_h, shift_w)
    strides = (stride_image, stride_y, stride_x)
    out_strides = (height.to(tl.int64) * width * CHANNELS, width * CHANNELS, CHANNELS)
    qkv += head * D
    out += head * D
    table += head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    if PAD:
        pad += head * D
    if not STREAMED:
        bias_a = relative_bias(table, first_query, 0, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
        if KEYS_B > 0:
            bias_b = relative_bias(table, first_query, KEYS_A, QUERIES, KEYS_B, WINDOW_H, WINDOW_W, False)
        if KEYS_C > 0:
            bias_c = relative_bias(table, first_query, KEYS_A + KEYS_B, QUERIES, KEYS_C, WINDOW_H, WINDOW_W, False)

    for window in range(tl.program_id(0) // (TILES * HEADS), windows, programs):
        place = window_place(window, rows, columns)
        image = place[0].to(tl.int64)
        image_qkv = qkv + image * stride_image
        y, x, real, inside = token_places(place, geometry, first_query, QUERIES, WINDOW_H, WINDOW_W, PAD_FIRST)
        query = load_tokens(image_qkv, token_offsets(y, x, strides), real, D, D_TILE)
        largest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        result = tl.zeros((QUERIES, D_TILE), tl.float32)
        if STREAMED:
            for first in range(0, TOKENS + place[4], KEYS_A):
                bias = relative_bias(table, first_query, first, QUERIES, KEYS_A, WINDOW_H, WINDOW_W, False)
                query = load_tile(
                    image_qkv, again(place, first), geometry, strides, first_query, QUERIES, D, D_TILE, WINDOW_H,
                    WINDOW_W, PAD_FIRST,
                )  # fmt: skip
                largest, total, result = _attend(
                    largest, total, result, query, first_query, bias, image_qkv, pad, place, geometry, strides, scale,
                    first, KEYS_A, QUERIES, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD, SHIFTED, PRECISION,
                )  # fmt: skip
        else:
            largest, total, result = _attend(
                largest, total, result, query, first_query, bias_a, image_qkv, pad, place, geometry, strides, scale, 0,
                KEYS_A, QUERIES, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD, SHIFTED, PRECISION,
            )  # fmt: skip
            if KEYS_B > 0:
                largest, total, result = _attend(
                    largest, total, result, query, first_query, bias_b, image_qkv, pad, place, geometry, strides, scale,
                    KEYS_A, KEYS_B, QUERIES, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD, SHIFTED,
                    PRECISION,
                )  # fmt: skip
            if KEYS_C > 0:
                largest, total, result = _attend(
                    largest, total, result, query, first_query, bias_c, image_qkv, pad, place, geometry, strides, scale,
                    KEYS_A + KEYS_B, KEYS_C, QUERIES, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD, SHIFTED,
                    PRECISION,
                )  # fmt: skip
        store_tokens(
            out + image * out_strides[0] + token_offsets(y, x, out_strides), real, result / total[:, None], D, D_TILE
        )


@triton.jit
def _attend(
    largest,  # (QUERIES) float32: of the logits so far
    total,  # (QUERIES) float32: sum of the weights so far
    result,  # (QUERIES, D_TILE) float32: weighted sum of values so far
    query,
    FIRST_QUERY,
    bias,  # (QUERIES, KEYS)
    qkv,
    pad,
    place,
    geometry,
    strides,
    scale,
    FIRST,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    PAD: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One piece of keys: largest logit, total and result with it."""
    key, value = load_piece(
        qkv, pad, place, geometry, strides, FIRST, KEYS, CHANNELS, D, D_TILE, WINDOW_H, WINDOW_W, PAD_FIRST, PAD,
    )  # fmt: skip
    logits = relative_logits(
        query,
        key,
        bias,
        place,
        geometry,
        scale,
        FIRST_QUERY,
        FIRST,
        QUERIES,
        KEYS,
        WINDOW_H,
        WINDOW_W,
        False,
        SHIFTED,
        PRECISION,
    )
    before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
    # Where nothing has been seen yet -infinity - -infinity would be NaN.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(logits - base[:, None])
    kept = tl.exp2(before - base)
    total = total * kept + tl.sum(weights, 1)
    result = dot(rounded(weights, query.dtype), value, result * kept[:, None], PRECISION)
    return largest, total, result


def window_attention_forward(
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: bool,
) -> Tensor:
    """The forward pass; arguments as `magnet_fast.ops.window_attention`'s, checked already.

    Args:
        qkv: (B, H, W, 3 * C), float32, bfloat16 or float16; last dimension contiguous, other strides free.
        bias_table: ((2 * window_h - 1) * (2 * window_w - 1), num_heads).
        pad_qkv: (3 * C), or None for zeros.

    Returns:
        (B, H, W, C) contiguous, dtype of `qkv`.
    """
    call = _Call(qkv, bias_table, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))

    def launch(config: triton.Config) -> None:
        programs = call.programs(config, "QUERIES")
        _forward_kernel[grid(programs * num_heads * call.tiles(config, "QUERIES"))](
            qkv, call.table, call.pad, out, *qkv.stride()[:3], *call.geometry, call.windows, programs, call.scale,
            **call.constants, **_options(config),
        )  # fmt: skip

    with on_device(qkv):
        _forward_autotuner(launch, qkv.device, *call.key)
    return out


def window_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `qkv`, `bias_table` and `pad_qkv` in their shapes and dtypes, None for those not wanted.

    Args:
        grad_out: (B, H, W, C), any strides.
        wanted: for each of the three, whether it is.
    """
    call = _Call(qkv, bias_table, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
    if grad_out.stride(3) != 1 or extent_of_image(grad_out) > LARGEST_IMAGE:  # for one, the expanded gradient of a sum
        grad_out = grad_out.contiguous()
    want_qkv, want_table = wanted[:2]
    want_pad = wanted[2] and pad_qkv is not None and call.padded
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if want_qkv else None
    tokens, channels = call.tokens, call.channels
    inputs = (qkv, call.table, call.pad, grad_out, grad_qkv)
    sizes = (*qkv.stride()[:3], *grad_out.stride()[:3], *call.geometry, call.windows)

    def launch(kernel: object, side: str, config: triton.Config) -> tuple[Tensor | None, Tensor | None]:
        """A kernel that gives dK and dV: the bias' gradients and those of padded tokens, by program."""
        programs, tiles = call.programs(config, side), call.tiles(config, side)
        slabs = _float32(qkv, programs, num_heads, tokens, tokens) if want_table else None
        pad_parts = _float32(qkv, programs * tiles, 2, channels) if want_pad else None
        more = (slabs, pad_parts) if side == "TILE" else (slabs, pad_parts, statistics)
        kernel[grid(programs * num_heads * tiles)](
            *inputs, *more, *sizes, programs, call.scale, **call.constants, **_options(config)
        )
        return slabs, pad_parts

    def launch_queries(config: triton.Config) -> None:
        programs = call.programs(config, "QUERIES")
        backward_queries_kernel[grid(programs * num_heads * call.tiles(config, "QUERIES"))](
            *inputs, statistics, *sizes, programs, call.scale, **call.constants, **_options(config)
        )

    slabs = pad_parts = grad_table = grad_pad = None
    with on_device(qkv):
        if (want_qkv or want_table or want_pad) and _whole(*call.key[:3]):
            whole = functools.partial(launch, backward_kernel, "TILE")
            slabs, pad_parts = _backward_autotuner(whole, qkv.device, *call.key)
        elif want_qkv or want_table or want_pad:
            statistics = _float32(qkv, 2, num_heads, call.windows, tokens)
            _backward_queries_autotuner(launch_queries, qkv.device, *call.key)
            by_keys = functools.partial(launch, backward_keys_kernel, "KEYS")
            slabs, pad_parts = _backward_keys_autotuner(by_keys, qkv.device, *call.key)
        if want_table:
            grad_table = torch.empty(bias_table.shape, dtype=bias_table.dtype, device=qkv.device)
            table_kernel[grid(num_heads * triton.cdiv(bias_table.shape[0], _ENTRIES))](
                slabs.sum(0), grad_table, num_heads, window_h, window_w, _ENTRIES, QUERIES=64
            )
    if wanted[2] and pad_qkv is not None:
        # Padded tokens' q is never used; without padded tokens nothing is.
        grad_pad = torch.zeros(pad_qkv.shape, dtype=pad_qkv.dtype, device=qkv.device)
        if pad_parts is not None:
            grad_pad[channels:] = pad_parts.sum(0).flatten()
    return [grad_qkv, grad_table, grad_pad]


def extent_of_image(tensor: Tensor) -> int:
    """Elements from the first to the last of one image of (B, H, W, C)."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


_LARGEST_TILE = 64
_STREAMED = 32
_ENTRIES = 16
# Tiles of 16 channels, which no model's heads have, take more registers than these.
_LEAST_CHANNELS = 32


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class _Call:
    """What the passes have in common: a call's tensors as the kernels read them, its sizes and constants."""

    def __init__(
        self,
        qkv: Tensor,
        bias_table: Tensor,
        pad_qkv: Tensor | None,
        num_heads: int,
        window_h: int,
        window_w: int,
        shift_h: int,
        shift_w: int,
        scale: float,
        pad_first: bool,
    ) -> None:
        batch, height, width, channels = qkv.shape
        rows, columns = -(-height // window_h), -(-width // window_w)
        rolled_h, rolled_w = (rows * window_h, columns * window_w) if pad_first else (height, width)
        self.device = qkv.device
        self.channels, d = channels // 3, channels // 3 // num_heads
        self.tokens, self.windows = window_h * window_w, batch * rows * columns
        self.padded = (height, width) != (rows * window_h, columns * window_w)
        self.geometry = (height, width, rows, columns, shift_h, shift_w, shift_h % rolled_h, shift_w % rolled_w)
        self.scale = scale * LOG2E.value
        self.table = bias_table.t().contiguous()
        self.pad = None if pad_qkv is None else pad_qkv.to(qkv.dtype).contiguous()
        self.constants = {
            "HEADS": num_heads,
            "D": d,
            "D_TILE": power_of_two(d, _LEAST_CHANNELS),
            "WINDOW_H": window_h,
            "WINDOW_W": window_w,
            "PAD_FIRST": pad_first,
            "PAD": self.padded and pad_qkv is not None,
            "SHIFTED": bool(shift_h or shift_w),
            "PRECISION": precision(qkv.dtype),
        }
        self.key = (self.tokens, d, qkv.dtype, self.constants["PRECISION"])

    def tiles(self, config: triton.Config, side: str) -> int:
        """Into how many tiles of queries or keys a configuration cuts a window."""
        return triton.cdiv(self.tokens, config.kwargs[side])

    def programs(self, config: triton.Config, side: str) -> int:
        """How many programs share a head's windows: enough to fill the device, all but one with equally many."""
        wanted = multiprocessors(self.device) * config.kwargs["RESIDENT"]
        wanted = triton.cdiv(wanted, self.constants["HEADS"] * self.tiles(config, side))
        return triton.cdiv(self.windows, triton.cdiv(self.windows, min(wanted, self.windows)))


def _options(config: triton.Config) -> dict[str, object]:
    """What of a configuration goes to the kernel: all but how many programs a multiprocessor should have."""
    return {name: value for name, value in config.all_kwargs().items() if name != "RESIDENT"}


def _whole(tokens: int, d: int, dtype: torch.dtype) -> bool:
    """Whether one backward kernel has the registers for a whole window."""
    return tokens <= _LARGEST_TILE and d <= 32 and dtype != torch.float32


def _pieces(tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """A window's tokens as up to three powers of two, with few lanes beyond the window; float32 streams equal ones."""
    if dtype == torch.float32:
        return _STREAMED, 0, 0
    covering = power_of_two(tokens)
    if covering <= _LARGEST_TILE:
        return covering, 0, 0
    first = 64 if tokens <= 144 else 128
    second = min(64, power_of_two(tokens - first))
    rest = tokens - first - second
    return first, second, power_of_two(rest) if rest > 0 else 0


def _forward_candidates(tokens: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    """Configurations by tokens of a window, head width and dtype, the best guess first.

    Only such as need no more registers than there are, which `magnet_fast.kernels.report` tells. A warp takes 16 rows
    of a product: 64 queries and 4 warps where their bias fits, else 16 queries, whose keys the warps share.
    """
    a, b, c = _pieces(tokens, dtype)
    large = dtype != torch.float32 and (tokens <= _LARGEST_TILE or (tokens <= 144 and d <= 32))
    sizes = {"QUERIES": min(_LARGEST_TILE, power_of_two(tokens)) if large else 16}
    return _by_programs({**sizes, "KEYS_A": a, "KEYS_B": b, "KEYS_C": c}, 4 if large or dtype == torch.float32 else 8)


def _backward_candidates(tokens: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    return _by_programs({"TILE": power_of_two(tokens)}, 4)


def _backward_queries_candidates(tokens: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    a, b, c = _pieces(tokens, dtype)
    return _by_programs({"QUERIES": 16, "KEYS_A": a, "KEYS_B": b, "KEYS_C": c}, _warps(tokens, d, dtype))


def _backward_keys_candidates(tokens: int, d: int, dtype: torch.dtype, precision: str) -> Sequence[triton.Config]:
    a, b, c = _pieces(tokens, dtype)
    if dtype == torch.float32 and d > 32:
        a //= 2
    return _by_programs({"KEYS": 16, "QUERIES_A": a, "QUERIES_B": b, "QUERIES_C": c}, _warps(tokens, d, dtype))


def _warps(tokens: int, d: int, dtype: torch.dtype) -> int:
    return 8 if dtype != torch.float32 and (d > 32 or tokens > 144) else 4


def _by_programs(sizes: dict[str, int], warps: int) -> list[triton.Config]:
    """One configuration for each number of programs that a multiprocessor should have: 8 warps of them are what the
    registers of these kernels allow at once; with more the device balances work better, but sums are in more parts."""
    return [
        triton.Config({**sizes, "RESIDENT": times * 8 // warps}, num_warps=warps, num_stages=1) for times in (1, 2, 4)
    ]


_forward_autotuner = Autotuner(_forward_candidates, _forward_kernel)
_backward_autotuner = Autotuner(_backward_candidates, backward_kernel)
_backward_queries_autotuner = Autotuner(_backward_queries_candidates, backward_queries_kernel)
_backward_keys_autotuner = Autotuner(_backward_keys_candidates, backward_keys_kernel)


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that `report` compiles: windows and head widths, shifted and padded, on meta tensors."""
    sizes = [((side, side), 32) for side in (7, 8, 12, 16)]
    sizes += [((8, 16), 32), ((7, 7), 64), ((12, 12), 64), ((7, 7), 16)]
    for (side_h, side_w), d in sizes[:1] if quick else sizes:
        heads, extent = 4, 30 if side_h > 7 else 31
        qkv = torch.empty(16, extent, extent, 3 * heads * d, dtype=dtype, device="meta")
        table = torch.empty((2 * side_h - 1) * (2 * side_w - 1), heads, dtype=dtype, device="meta")
        pad = torch.empty(3 * heads * d, dtype=dtype, device="meta")
        arguments = (qkv, table, pad, heads, side_h, side_w, side_h // 2, side_w // 2, d**-0.5, True)
        grad = torch.empty(16, extent, extent, heads * d, dtype=dtype, device="meta")
        label = f"w {side_h}x{side_w}, d {d}"
        yield label, functools.partial(window_attention_forward, *arguments)
        yield label, functools.partial(window_attention_backward, grad, *arguments, (True, True, True))
