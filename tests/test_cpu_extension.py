"""The C++ extension called directly, against an independent float64 implementation with autograd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magnet_fast import _cpu
from magnet_fast.ops._view import view
from magnet_fast.ops._window_settings import WindowSettings

LEVELS = _cpu.supported_simd_levels()
# Float32 against float64: results near 1, sums of at most a few hundred terms.
TOLERANCE = 4e-6


class Case(NamedTuple):
    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int]
    pad_first: bool = True
    heads: int = 2
    head_dim: int = 8
    batch: int = 1
    padded: bool = True  # pad_qkv given


class Inputs(NamedTuple):
    qkv: Tensor
    bias: Tensor
    pad_qkv: Tensor | None
    grad_out: Tensor


@pytest.fixture(autouse=True)
def _restore_level():
    before = _cpu.simd_level()
    yield
    _cpu.set_simd_level(before)


def make(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    channels = case.heads * case.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    table = (2 * case.window[0] - 1) * (2 * case.window[1] - 1)
    return Inputs(
        draw(case.batch, case.height, case.width, 3 * channels),
        draw(table, case.heads),
        draw(3 * channels) if case.padded else None,
        draw(case.batch, case.height, case.width, channels),
    )


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients (qkv, bias, pad_qkv) by moving the data: pad, roll, partition, mask, in float64."""
    (window_h, window_w), (shift_h, shift_w) = case.window, case.shift
    batch, height, width, wide = inputs.qkv.shape
    padded_h, padded_w = -(-height // window_h) * window_h, -(-width // window_w) * window_w
    qkv, bias = inputs.qkv.double().requires_grad_(), inputs.bias.double().requires_grad_()
    pad = (torch.zeros(wide) if inputs.pad_qkv is None else inputs.pad_qkv).double().requires_grad_()

    def pad_map(x: Tensor) -> Tensor:
        full = pad.expand(batch, padded_h, padded_w, wide).clone()
        full[:, :height, :width] = x
        return full

    def roll(x: Tensor, sign: int) -> Tensor:
        return torch.roll(x, (sign * shift_h, sign * shift_w), dims=(1, 2))

    def partition(x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, window_w)).unflatten(1, (-1, window_h)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)  # (batch * windows, N, channels)

    shifted = roll(pad_map(qkv), -1) if case.pad_first else pad_map(roll(qkv, -1))
    query, key, value = partition(shifted).unflatten(2, (3, case.heads, case.head_dim)).permute(2, 0, 3, 1, 4)

    rows, columns = torch.zeros(padded_h), torch.zeros(padded_w)
    if shift_h:
        rows[-window_h:], rows[-shift_h:] = 1, 2
        rows[-window_h:-shift_h] = 1
    if shift_w:
        columns[-window_w:], columns[-shift_w:] = 1, 2
    region = partition((10 * rows[:, None] + columns).expand(batch, -1, -1)[..., None])  # (batch * windows, N, 1)

    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, case.window), indexing="ij"))
    table_row = (y[:, None] - y + window_h - 1) * (2 * window_w - 1) + x[:, None] - x + window_w - 1
    scores = query @ key.mT * case.head_dim**-0.5 + bias[table_row].permute(2, 0, 1)
    scores = scores.masked_fill((region != region.mT)[:, None], -torch.inf)
    out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    out = out.unflatten(0, (batch, padded_h // window_h, padded_w // window_w)).unflatten(3, (window_h, window_w))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    out = roll(out, 1)[:, :height, :width] if case.pad_first else roll(out[:, :height, :width], 1)
    return out.detach(), list(torch.autograd.grad(out, (qkv, bias, pad), inputs.grad_out.double()))


def settings_of(case: Case) -> WindowSettings:
    return WindowSettings(case.heads, *case.window, *case.shift, case.head_dim**-0.5, case.pad_first)


def forward(case: Case, inputs: Inputs, *, threads: int = 1, into: Tensor | None = None, **changes: object) -> Tensor:
    """`changes`: of the call's arguments, or of its settings."""
    out = into
    if out is None:
        out = torch.full_like(inputs.grad_out, torch.nan, memory_format=torch.contiguous_format)
    arguments = {
        "qkv": view(inputs.qkv),
        "bias": view(inputs.bias),
        "pad_qkv": view(inputs.pad_qkv),
        "out": view(out),
        "settings": settings_of(case),
        "threads": threads,
    }
    _cpu.window_attention_forward(**changed(arguments, changes))
    return out


def backward(
    case: Case,
    inputs: Inputs,
    *,
    threads: int = 1,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    into: Tensor | None = None,
    **changes: object,
) -> list[Tensor | None]:
    """Gradients of qkv, bias and pad_qkv, None for those not wanted; the buffers start as NaN."""
    shapes = (inputs.qkv.shape, inputs.bias.shape, inputs.qkv.shape[-1:])
    grads = [torch.full(shape, torch.nan) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    if into is not None:
        grads[0] = into
    arguments = {
        "grad_out": view(inputs.grad_out),
        "qkv": view(inputs.qkv),
        "bias": view(inputs.bias),
        "pad_qkv": view(inputs.pad_qkv),
        "grad_qkv": view(grads[0]),
        "grad_bias": view(grads[1]),
        "grad_pad_qkv": view(grads[2]),
        "settings": settings_of(case),
        "threads": threads,
    }
    _cpu.window_attention_backward(**changed(arguments, changes))
    return grads


def changed(arguments: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    of_settings = {name: value for name, value in changes.items() if name in WindowSettings._fields}
    others = {name: value for name, value in changes.items() if name not in of_settings}
    return {**arguments, "settings": arguments["settings"]._replace(**of_settings), **others}


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert torch.isfinite(got).all()
    error = (got - wanted).abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= tolerance * (1 + wanted.abs().max()), f"largest difference {error:.2e}"


def check(case: Case, inputs: Inputs | None = None) -> None:
    inputs = inputs or make(case)
    out, grads = expected(case, inputs)
    assert_close(forward(case, inputs), out)
    for got, wanted in zip(backward(case, inputs), grads, strict=True):
        assert_close(got, wanted)


CASES = {
    "no padding, no shift": Case(8, 12, (4, 4), (0, 0)),
    "shift": Case(8, 12, (4, 4), (2, 2)),
    "odd shift, rectangular": Case(9, 13, (4, 5), (1, 3), batch=2),
    "shift along one axis": Case(9, 13, (4, 5), (0, 2), batch=2),
    "window 12 on 15 x 15": Case(15, 15, (12, 12), (6, 6), head_dim=32),
    "window 12 on 30 x 18": Case(30, 18, (12, 12), (6, 6), heads=1, head_dim=32),
    "padding reaches two windows": Case(13, 9, (6, 6), (4, 5)),
    "map smaller than the window": Case(3, 2, (7, 7), (3, 5), head_dim=16),
    "one pixel": Case(1, 1, (7, 7), (3, 3)),
    "head_dim 1": Case(7, 6, (3, 4), (1, 2), head_dim=1, heads=5),
    "head_dim 20": Case(7, 7, (7, 7), (3, 3), head_dim=20),
    "head_dim 72": Case(8, 9, (7, 7), (3, 3), heads=1, head_dim=72),
    "heads of two tasks": Case(13, 15, (12, 12), (6, 6), heads=5, head_dim=8),
    "heads of three tasks": Case(5, 6, (3, 4), (1, 2), heads=19, head_dim=3, batch=2),
    "window 16": Case(17, 16, (16, 16), (8, 8), heads=1, head_dim=64),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pad_first", [True, False])
@pytest.mark.parametrize("padded", [True, False], ids=["pad_qkv", "no pad_qkv"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name, padded, pad_first, level):
    _cpu.set_simd_level(level)
    check(CASES[name]._replace(padded=padded, pad_first=pad_first))


@pytest.mark.parametrize("pad_first", [True, False])
def test_every_padding_residue(pad_first):
    for height in range(4, 8):
        for width in range(5, 10):
            for shift in ((0, 0), (2, 2), (3, 1)):
                check(Case(height, width, (4, 5), shift, pad_first, head_dim=4))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    window = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    return Case(
        draw(st.integers(1, 14)),
        draw(st.integers(1, 14)),
        window,
        (draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1))),
        draw(st.booleans()),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 19)),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(LEVELS))
def test_any_shape(case, level):
    _cpu.set_simd_level(level)
    check(case)


@pytest.mark.parametrize("case", [CASES["odd shift, rectangular"], CASES["heads of two tasks"]])
@pytest.mark.parametrize("level", LEVELS)
def test_threads_do_not_change_a_bit(case, level):
    _cpu.set_simd_level(level)
    inputs = make(case)
    out, grads = forward(case, inputs), backward(case, inputs)
    for threads in (1, 2, 3):
        assert torch.equal(forward(case, inputs, threads=threads), out)
        for got, first in zip(backward(case, inputs, threads=threads), grads, strict=True):
            assert torch.equal(got, first)


@pytest.mark.parametrize("which", range(3), ids=["qkv", "bias", "pad_qkv"])
def test_one_gradient_alone(which):
    case = CASES["padding reaches two windows"]
    inputs = make(case)
    together = backward(case, inputs)
    alone = backward(case, inputs, wanted=tuple(index == which for index in range(3)))
    assert [grad is not None for grad in alone] == [index == which for index in range(3)]
    assert_close(alone[which], together[which].double(), 1e-6)


def test_padded_queries_have_no_gradient():
    case = CASES["window 12 on 15 x 15"]
    grad_pad = backward(case, make(case))[2]
    third = case.heads * case.head_dim
    assert (grad_pad[:third] == 0).all()
    assert (grad_pad[third:] != 0).all()


def test_views_are_read_and_written_in_place():
    case = Case(9, 7, (4, 5), (1, 2), batch=2)
    plain = make(case)
    out, (grad_qkv, grad_bias, grad_pad) = forward(case, plain), backward(case, plain)

    wide = torch.full((4, 9, 7, plain.qkv.shape[-1] + 5), torch.nan)
    sliced = wide[::2, :, :, 3:-2]  # every second image of a wider tensor
    sliced.copy_(plain.qkv)
    swapped = plain.qkv.transpose(1, 2).contiguous().transpose(1, 2)  # height and width exchanged in memory
    grad_out = plain.grad_out.transpose(0, 2).contiguous().transpose(0, 2)
    for qkv in (sliced, swapped):
        inputs = plain._replace(qkv=qkv, grad_out=grad_out)
        assert torch.equal(forward(case, inputs), out)
        for got, wanted in zip(backward(case, inputs), (grad_qkv, grad_bias, grad_pad), strict=True):
            assert torch.equal(got, wanted)

    written = torch.full((2, 7, 9, plain.grad_out.shape[-1] + 1), torch.nan)
    target = written.transpose(1, 2)[..., :-1]
    assert torch.equal(forward(case, plain, into=target), out)
    assert written[..., -1].isnan().all()
    written = torch.full_like(wide, torch.nan)
    backward(case, plain, into=written[::2, :, :, 3:-2])
    assert torch.equal(written[::2, :, :, 3:-2], grad_qkv)
    assert written[1::2].isnan().all() and written[..., :3].isnan().all() and written[..., -2:].isnan().all()


def test_broadcast_inputs():
    case = Case(6, 5, (3, 4), (1, 2), batch=3)
    inputs = make(case)
    inputs = inputs._replace(
        qkv=inputs.qkv[:1].expand(3, -1, -1, -1), grad_out=inputs.grad_out[:, :1, :1].expand(-1, 6, 5, -1)
    )
    check(case, inputs)


def test_more_windows_than_65535():
    case = Case(128, 130, (1, 1), (0, 0), heads=8, head_dim=1)  # one token a window: the output is v itself
    inputs = make(case)
    assert torch.equal(forward(case, inputs), inputs.qkv[..., 16:])


def test_empty_batch():
    case = Case(5, 5, (3, 3), (1, 1), batch=0)
    inputs = make(case)
    assert forward(case, inputs).shape == (0, 5, 5, 16)
    grad_qkv, grad_bias, grad_pad = backward(case, inputs)
    assert grad_qkv.shape == (0, 5, 5, 48)
    assert (grad_bias == 0).all() and (grad_pad == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_extreme_scores(level):
    """Logits from -2000 to 2000: the smallest weights vanish, nothing overflows."""
    _cpu.set_simd_level(level)
    case = Case(6, 7, (4, 4), (2, 2))
    inputs = make(case)
    inputs = inputs._replace(bias=inputs.bias * 500)
    out, grads = expected(case, inputs)
    # Logits this large carry an error of 2000 * 2^-24 each; so do the weights made of them.
    assert_close(forward(case, inputs), out, 1e-3)
    for got, wanted in zip(backward(case, inputs), grads, strict=True):
        assert_close(got, wanted, 1e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_region(level, bad):
    _cpu.set_simd_level(level)
    case = Case(7, 9, (4, 5), (2, 2))
    inputs = make(case)
    clean = forward(case, inputs)
    inputs.qkv[0, 3, 4] = bad
    out, wanted = forward(case, inputs), expected(case, inputs)[0]
    assert torch.equal(out.isnan(), wanted.isnan())
    assert 0 < out.isnan().sum() < out.numel()
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


@pytest.mark.parametrize("level", LEVELS)
def test_minus_infinity_in_the_bias_hides_a_key(level):
    _cpu.set_simd_level(level)
    case = Case(5, 5, (4, 4), (0, 0))
    inputs = make(case)
    inputs.bias[:21] = -torch.inf  # no query sees a key below it: neither real ones nor the padding
    out, grads = expected(case, inputs)
    assert_close(forward(case, inputs), out)
    for got, wanted in zip(backward(case, inputs), grads, strict=True):
        assert_close(got, wanted)


MAP = (1, 8, 8, 48)
"""Sizes of qkv in the tests below: 2 heads of 8 channels."""

BAD = {
    "qkv: dtype": {"qkv": (64, MAP, (3072, 384, 48, 1), 4)},
    "qkv: unknown dtype": {"qkv": (64, MAP, (3072, 384, 48, 1), 9)},
    "qkv: no address": {"qkv": (0, MAP, (3072, 384, 48, 1), 0)},
    "qkv: missing": {"qkv": None},
    "qkv: dimensions": {"qkv": (64, MAP[1:], (384, 48, 1), 0)},
    "qkv: batch": {"qkv": (64, (-1, 8, 8, 48), (3072, 384, 48, 1), 0)},
    "qkv: height": {"qkv": (64, (1, 0, 8, 48), (3072, 384, 48, 1), 0)},
    "qkv: no third": {"qkv": (64, (1, 8, 8, 47), (3072, 384, 48, 1), 0)},
    "qkv: strides": {"qkv": (64, MAP, (3072, -1, 48, 1), 0)},
    "qkv: channels apart": {"qkv": (64, MAP, (6144, 768, 96, 2), 0)},
    "qkv: not addressable": {"qkv": (64, (2**30, 2**30, 2**30, 48), (0, 0, 0, 1), 0)},
    "bias: no address": {"bias": (0, (63, 2), (2, 1), 0)},
    "bias: sizes": {"bias": (64, (62, 2), (2, 1), 0)},
    "bias: strides": {"bias": (64, (63, 2), (4, 1), 0)},
    "bias: dtype": {"bias": (64, (63, 2), (2, 1), 1)},
    "pad_qkv: sizes": {"pad_qkv": (64, (16,), (1,), 0)},
    "pad_qkv: alignment": {"pad_qkv": (65, (48,), (1,), 0)},
    "heads: 0": {"num_heads": 0},
    "heads: no divisor": {"num_heads": 3},
    "window_h": {"window_h": 0},
    "window_w": {"window_w": 5000},
    "shift_h": {"shift_h": 4},
    "shift_w": {"shift_w": -1},
    "scale": {"scale": float("nan")},
    "threads": {"threads": 0},
}
BAD_RESULTS = {
    "out: missing": {"out": None},
    "out: alignment": {"out": (66, (1, 8, 8, 16), (1024, 128, 16, 1), 0)},
    "out: sizes": {"out": (64, (1, 8, 8, 48), (3072, 384, 48, 1), 0)},
    "out: tokens overlap": {"out": (64, (1, 8, 8, 16), (1024, 128, 15, 1), 0)},
}
BAD_GRADIENTS = {
    "grad_out: missing": {"grad_out": None},
    "grad_out: strides": {"grad_out": (64, (1, 8, 8, 16), (1, 1, -1, 1), 0)},
    "grad_qkv: tokens overlap": {"grad_qkv": (64, MAP, (3072, 384, 47, 1), 0)},
    "grad_qkv: alignment": {"grad_qkv": (66, MAP, (3072, 384, 48, 1), 0)},
    "grad_bias: dtype": {"grad_bias": (64, (63, 2), (2, 1), 3)},
    "grad_pad_qkv: sizes": {"grad_pad_qkv": (64, (16,), (1,), 0)},
}


@pytest.mark.parametrize("name", [*BAD, *BAD_RESULTS])
def test_forward_refuses(name):
    case = Case(8, 8, (4, 5), (1, 1))
    inputs = make(case)
    out = torch.full_like(inputs.grad_out, 7.0)
    with pytest.raises(ValueError, match=rf"^{name.partition(':')[0]}: expected"):
        forward(case, inputs, into=out, **(BAD | BAD_RESULTS)[name])
    assert (out == 7.0).all()


@pytest.mark.parametrize("name", [*BAD, *BAD_GRADIENTS])
def test_backward_refuses(name):
    case = Case(8, 8, (4, 5), (1, 1))
    with pytest.raises(ValueError, match=rf"^{name.partition(':')[0]}: expected"):
        backward(case, make(case), **(BAD | BAD_GRADIENTS)[name])


@pytest.mark.parametrize(
    "wrong", [7, (64,), (64, (1, 2), (1,), 0), ("a", (1,), (1,), 0), (64, (1.5,), (1,), 0), (64, (2**70,), (1,), 0)]
)
def test_only_views_are_tensors(wrong):
    case = Case(8, 8, (4, 5), (1, 1))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        forward(case, make(case), qkv=wrong)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_scale_above_zero_only(scale):
    case = Case(8, 8, (4, 5), (1, 1))
    with pytest.raises(ValueError, match="^scale: expected a finite number above 0"):
        forward(case, make(case), scale=scale)


@pytest.mark.parametrize(("dtype", "size"), [(1, 2), (2, 2), (3, 8)], ids=["bfloat16", "float16", "float64"])
def test_addresses_are_aligned_for_the_dtype(dtype, size):
    case = Case(8, 8, (4, 5), (1, 1))
    address, *rest, _ = view(make(case).qkv)
    with pytest.raises(ValueError, match="^qkv: expected an address aligned for its dtype"):
        forward(case, make(case), qkv=(address + size // 2, *rest, dtype))


def test_simd_levels():
    assert LEVELS[-1] == "portable" and set(LEVELS) <= {"amx", "avx512_bf16", "avx512", "avx2", "portable"}
    for level in LEVELS:
        _cpu.set_simd_level(level)
        assert _cpu.simd_level() == level
    with pytest.raises(ValueError, match="name: 'sse9' .* portable"):
        _cpu.set_simd_level("sse9")
    assert _cpu.simd_level() == "portable"


def test_extension_needs_no_torch():
    code = "import sys, magnet_fast._cpu as c; assert 'torch' not in sys.modules; print(c.simd_level())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == LEVELS[0]


def test_one_openmp_runtime():
    """torch and the extension share one libgomp, so one thread pool."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split(None, 5)[-1] for line in maps if "libgomp.so" in line}) == 1
