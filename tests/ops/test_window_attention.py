"""window_attention against loops over tokens, and against the Swin layers of timm, transformers and torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from magnet_fast import ops

from . import loops
from .cases import assert_low_precision, weighted_sum, window_case

ORDERS = pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])


@pytest.fixture(autouse=True)
def reference():
    with ops.backend("reference"):
        yield


def by_loops(case, *, window, shift, heads=2, pad_first=True):
    pad_qkv = case.leaves[2] if len(case.leaves) == 3 else None
    return (
        loops.window_attention(
            *case.leaves[:2], num_heads=heads, window=window, shift=shift, pad_qkv=pad_qkv, pad_first=pad_first
        ),
    )


@ORDERS
@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (0, 1), (1, 0)])
@pytest.mark.parametrize("size", [(2, 3), (3, 5), (4, 7), (1, 1), (5, 6)])
def test_equals_loops(size, shift, pad_first):
    case = window_case(batch=2, size=size, window=(2, 3), shift=shift, pad_first=pad_first)
    expected = by_loops(case, window=(2, 3), shift=shift, pad_first=pad_first)
    torch.testing.assert_close(case(), expected)
    grads = torch.autograd.grad(weighted_sum(expected), case.leaves, allow_unused=True)
    for ours, theirs in zip(case.gradients(), grads, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_equals_loops_for_any_sizes(data):
    side = st.integers(1, 4)
    window = data.draw(st.tuples(side, side), "window")
    shift = tuple(data.draw(st.integers(0, w - 1), "shift") for w in window)
    size = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)), "size")
    heads, padding, pad_first = data.draw(st.integers(1, 3)), data.draw(st.booleans()), data.draw(st.booleans())
    case = window_case(
        batch=1, size=size, window=window, shift=shift, heads=heads, d=1, padding=padding, pad_first=pad_first
    )
    torch.testing.assert_close(case(), by_loops(case, window=window, shift=shift, heads=heads, pad_first=pad_first))


def test_every_padding_residue():
    """Both orders, every (H mod w, W mod w), and a shift: the padded tokens are keys, and their queries are dropped."""
    for height in range(4, 8):
        for width in range(5, 9):
            for pad_first in (True, False):
                options = {"window": (4, 4), "shift": (2, 1), "heads": 1, "pad_first": pad_first}
                case = window_case(batch=1, size=(height, width), d=2, **options)
                torch.testing.assert_close(case(), by_loops(case, **options))


def test_padding_token_gets_no_query_gradient():
    case = window_case(size=(3, 4))
    query, key, value = case.gradients()[2].chunk(3)
    assert not query.any() and key.any() and value.any()


def test_padding_token_gets_zeros_where_nothing_is_padded():
    case = window_case(size=(4, 6))
    assert not case.gradients()[2].any()


def test_scale():
    case = window_case()
    (qkv, table), options = case.arguments(*case.leaves)
    doubled = torch.cat([qkv[..., :4] * 2, qkv[..., 4:]], -1)
    padding = options.pop("pad_qkv")
    torch.testing.assert_close(
        ops.window_attention(qkv, table, **options, pad_qkv=padding, scale=2 * 2**-0.5),
        ops.window_attention(doubled, table, **options, pad_qkv=padding),
    )


def test_numpy_sizes():
    """Sizes read off arrays work as Python's ints do, also where a schema wants ints."""
    case = window_case(dtype=torch.float32)
    (qkv, table), options = case.arguments(*case.leaves)
    window, shift = (tuple(np.int64(n) for n in options[name]) for name in ("window_size", "shift"))
    options = {**options, "num_heads": np.int64(2), "window_size": window, "shift": shift, "scale": np.float32(0.5)}
    for backend in ("reference", "cpu"):
        with ops.backend(backend):
            assert ops.window_attention(qkv, table, **options).shape == (2, 5, 4, 4)


def test_views_of_wider_tensors():
    case = window_case(batch=2)
    wide = torch.randn(5, 7, 4, 20, dtype=torch.float64)
    view = wide[1:5:2, 1:6, :, 5:17]
    assert not view.is_contiguous()
    (_, table), options = case.arguments(*case.leaves)
    torch.testing.assert_close(
        ops.window_attention(view, table, **options), ops.window_attention(view.contiguous(), table, **options)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", ["same", "float32"])
def test_low_precision(dtype, table_dtype):
    options = {"window": (2, 3), "shift": (1, 2)}
    low = window_case(dtype=dtype, d=8, **options)
    truth = window_case(d=8, **options)
    for tensor, other in zip(truth.leaves, low.leaves, strict=True):
        tensor.data.copy_(other.data)
    plain = by_loops(low, **options)
    plain_grads = torch.autograd.grad(weighted_sum(plain), low.leaves)
    if table_dtype == "float32":
        low.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in low.leaves[1:]]
    ours = low()[0]
    assert ours.dtype == dtype
    assert_low_precision(ours, plain[0], truth()[0], dtype, "output")
    names = ("qkv", "bias_table", "pad_qkv")
    for name, leaf, *grads in zip(names, low.leaves, low.gradients(), plain_grads, truth.gradients(), strict=True):
        assert grads[0].dtype == leaf.dtype
        assert_low_precision(*grads, dtype, f"gradient of {name}")


# ---- Other libraries' Swin -----------------------------------------------------------------------------------------

HEADS, CHANNELS, WINDOW = 2, 8, 4
SIZES = pytest.mark.parametrize("size", [(8, 8), (9, 13), (7, 6), (3, 5)], ids=str)
SHIFTS = pytest.mark.parametrize("shift", [0, 1, 2, 3])


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module.double().eval()


def compare(ours, theirs, inputs, parameters, **tolerance):
    """Same output, same gradients of the map and of every parameter."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    weights = torch.linspace(0.5, 1.5, ours.numel(), dtype=ours.dtype).view_as(ours)
    tensors = [inputs, *parameters]
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), tensors, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((theirs * weights).sum(), tensors, allow_unused=True, materialize_grads=True),
        **tolerance,
    )


def attend(x, qkv, table, proj, shift, pad_first):
    attended = ops.window_attention(
        qkv(x), table, num_heads=HEADS, window_size=WINDOW, shift=shift, pad_qkv=qkv.bias, pad_first=pad_first
    )
    return proj(attended)


@SIZES
@SHIFTS
def test_equals_timm(size, shift):
    block = SwinTransformerBlock(
        CHANNELS, size, num_heads=HEADS, window_size=WINDOW, shift_size=shift, always_partition=True
    )
    block = randomised(block)
    block._init_buffers()
    x = torch.randn(2, *size, CHANNELS, dtype=torch.float64, requires_grad=True)
    attention = block.attn
    ours = attend(x, attention.qkv, attention.relative_position_bias_table, attention.proj, shift, pad_first=False)
    compare(ours, block._attn(x), x, attention.parameters())


@SIZES
@SHIFTS
def test_equals_torchvision(size, shift):
    attention = randomised(ShiftedWindowAttention(CHANNELS, [WINDOW, WINDOW], [shift, shift], HEADS))
    x = torch.randn(2, *size, CHANNELS, dtype=torch.float64, requires_grad=True)
    # torchvision drops the shift of an axis that has one window only; that choice is the caller's here.
    own_shift = tuple(0 if length <= WINDOW else shift for length in size)
    ours = attend(x, attention.qkv, attention.relative_position_bias_table, attention.proj, own_shift, pad_first=True)
    compare(ours, attention(x), x, attention.parameters())


@SIZES
@SHIFTS
def test_equals_transformers(size, shift):
    config = SwinConfig(window_size=WINDOW, qkv_bias=True, drop_path_rate=0.0)
    layer = randomised(SwinLayer(config, CHANNELS, size, HEADS, shift_size=shift))
    tokens = torch.randn(2, size[0] * size[1], CHANNELS, dtype=torch.float64, requires_grad=True)
    theirs = layer(tokens, size, always_partition=True)[0]

    query, key, value, proj = (module for module in layer.attention.modules() if isinstance(module, nn.Linear))
    weight = torch.cat([query.weight, key.weight, value.weight])
    bias = torch.cat([query.bias, key.bias, value.bias])
    table = next(p for name, p in layer.attention.named_parameters() if name.endswith("bias_table"))

    def qkv(x):
        return nn.functional.linear(x, weight, bias)

    qkv.bias = bias
    x = layer.layernorm_before(tokens).view(2, *size, CHANNELS)
    hidden = tokens + attend(x, qkv, table, proj, shift, pad_first=True).flatten(1, 2)
    ours = hidden + mlp(layer, layer.layernorm_after(hidden))
    # transformers takes the softmax in float32 whatever the dtype.
    compare(ours, theirs, tokens, layer.parameters(), rtol=1e-5, atol=1e-5)


def mlp(layer, x):
    if hasattr(layer, "mlp"):
        return layer.mlp(x)
    return layer.output(layer.intermediate(x))  # transformers before SwinMLP


# ---- Bad input -----------------------------------------------------------------------------------------------------

QKV, TABLE = torch.zeros(1, 4, 4, 12), torch.zeros(9, 2)
GOOD = {"qkv": QKV, "bias_table": TABLE, "num_heads": 2, "window_size": 2}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "qkv: expected a tensor .* got list", {"qkv": [1]}),
        (TypeError, "qkv: expected float32.* got int64", {"qkv": QKV.long()}),
        (TypeError, "qkv: expected a dense tensor", {"qkv": QKV.to_sparse()}),
        (ValueError, r"qkv: expected 4 dimensions .* got shape \(4, 4, 12\)", {"qkv": QKV[0]}),
        (ValueError, "qkv: every dimension .* at least 1", {"qkv": QKV[:0]}),
        (ValueError, "qkv: .* multiple of 3, got 11", {"qkv": QKV[..., :11]}),
        (
            ValueError,
            "qkv: the last dimension must be contiguous",
            {"qkv": torch.zeros(1, 4, 12, 4).mT},
        ),
        (ValueError, "num_heads: 3 heads do not divide the 4 channels", {"num_heads": 3}),
        (ValueError, "num_heads: expected at least 1, got 0", {"num_heads": 0}),
        (TypeError, "num_heads: expected an int, got float", {"num_heads": 2.0}),
        (ValueError, r"bias_table: expected shape \(9, 2\) .* got \(9, 3\)", {"bias_table": torch.zeros(9, 3)}),
        (ValueError, r"bias_table: expected shape \(15, 2\)", {"window_size": (2, 3)}),
        (TypeError, "bias_table: expected dtype float32 .* got float64", {"bias_table": TABLE.double()}),
        (
            TypeError,
            "bias_table: .* bfloat16 or float32",
            {"qkv": QKV.bfloat16(), "bias_table": TABLE.half()},
        ),
        (ValueError, "bias_table: expected the device of qkv", {"bias_table": TABLE.to("meta")}),
        (ValueError, r"pad_qkv: expected shape \(12,\)", {"pad_qkv": torch.zeros(11)}),
        (TypeError, "pad_qkv: expected dtype float32", {"pad_qkv": torch.zeros(12).half()}),
        (ValueError, "window_size: expected at least 1, got 0", {"window_size": 0}),
        (ValueError, "window_size: expected an int or a .* pair", {"window_size": (2, 2, 2)}),
        (TypeError, "window_size: .* ints, got '2'", {"window_size": "2"}),
        (ValueError, r"shift: expected less than window_size \(2, 2\), got \(2, 2\)", {"shift": 2}),
        (ValueError, "shift: expected at least 0, got -1", {"shift": -1}),
        (ValueError, "scale: expected a finite number above 0, got 0", {"scale": 0}),
        (ValueError, "scale: .* got nan", {"scale": float("nan")}),
        (TypeError, "scale: expected a number, got str", {"scale": "1"}),
        (TypeError, "pad_first: expected a bool", {"pad_first": 1}),
        (ValueError, "dropout: .* not offered", {"dropout": 0.1}),
    ],
)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.window_attention(**{**GOOD, **change})
