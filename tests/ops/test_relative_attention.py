"""relative_attention against loops over tokens, and against the layers of transformers and timm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer_sam import Block
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from magnet_fast import ops

from . import loops
from .cases import assert_low_precision, relative_case, weighted_sum


@pytest.fixture(autouse=True)
def reference():
    with ops.backend("reference"):
        yield


def by_loops(case, *, window, heads=2):
    pad_qkv = case.leaves[3] if len(case.leaves) == 4 else None
    return (loops.relative_attention(*case.leaves[:3], num_heads=heads, window=window, pad_qkv=pad_qkv),)


@pytest.mark.parametrize("window", [(2, 3), (4, 2), None], ids=str)
@pytest.mark.parametrize("size", [(2, 3), (3, 5), (4, 7), (1, 1)], ids=str)
def test_equals_loops(size, window):
    case = relative_case(batch=2, size=size, window=window)
    expected = by_loops(case, window=window)
    torch.testing.assert_close(case(), expected)
    grads = torch.autograd.grad(weighted_sum(expected), case.leaves, allow_unused=True)
    for ours, theirs in zip(case.gradients(), grads, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_equals_loops_for_any_sizes(data):
    side = st.integers(1, 5)
    options = {"window": data.draw(st.none() | st.tuples(side, side), "window"), "heads": data.draw(st.integers(1, 3))}
    size, d = data.draw(st.tuples(side, side), "size"), data.draw(st.integers(1, 3))
    case = relative_case(batch=1, size=size, d=d, padding=data.draw(st.booleans()), **options)
    torch.testing.assert_close(case(), by_loops(case, **options))


def test_padding_token_gets_no_query_gradient():
    query, key, value = relative_case(size=(3, 4)).gradients()[3].chunk(3)
    assert not query.any() and key.any() and value.any()


def test_padding_token_gets_zeros_where_nothing_is_padded():
    assert not relative_case(size=(4, 6)).gradients()[3].any()


def test_scale_leaves_the_positions_alone():
    case = relative_case(window=None, padding=False)
    qkv, height, width = case.leaves
    doubled = torch.cat([qkv[..., :4], qkv[..., 4:8] * 2, qkv[..., 8:]], -1)
    torch.testing.assert_close(
        ops.relative_attention(qkv, height, width, num_heads=2, scale=2 * 2**-0.5),
        ops.relative_attention(doubled, height, width, num_heads=2),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", ["same", "float32"])
def test_low_precision(dtype, table_dtype):
    low, truth = relative_case(dtype=dtype, d=8), relative_case(d=8)
    for tensor, other in zip(truth.leaves, low.leaves, strict=True):
        tensor.data.copy_(other.data)
    plain = by_loops(low, window=(2, 3))
    plain_grads = torch.autograd.grad(weighted_sum(plain), low.leaves)
    if table_dtype == "float32":
        low.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in low.leaves[1:]]
    ours = low()[0]
    assert ours.dtype == dtype
    assert_low_precision(ours, plain[0], truth()[0], dtype, "output")
    names = ("qkv", "rel_height", "rel_width", "pad_qkv")
    for name, leaf, *grads in zip(names, low.leaves, low.gradients(), plain_grads, truth.gradients(), strict=True):
        assert grads[0].dtype == leaf.dtype
        assert_low_precision(*grads, dtype, f"gradient of {name}")


# ---- Other libraries' layers ---------------------------------------------------------------------------------------

HEADS, CHANNELS = 2, 8
WINDOWS = pytest.mark.parametrize(("window", "size"), [(3, (7, 5)), (4, (4, 8)), (0, (5, 5)), (0, (4, 6))], ids=str)


def randomised(module):
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module.double().eval()


def attend(x, attention, window):
    return attention.proj(
        ops.relative_attention(
            attention.qkv(x),
            attention.rel_pos_h,
            attention.rel_pos_w,
            num_heads=HEADS,
            window_size=window or None,
            pad_qkv=attention.qkv.bias,
        )
    )


def compare(ours, theirs, inputs, parameters, **tolerance):
    """Same output, same gradients of the map and of every parameter."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    tensors = [inputs, *parameters]
    torch.testing.assert_close(
        torch.autograd.grad(weighted_sum((ours,)), tensors),
        torch.autograd.grad(weighted_sum((theirs,)), tensors),
        **tolerance,
    )


@WINDOWS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_transformers(window, size, implementation):
    config = SamVisionConfig(hidden_size=CHANNELS, num_attention_heads=HEADS, image_size=80, patch_size=16, mlp_dim=16)
    config._attn_implementation = implementation
    layer = SamVisionLayer(config, window)
    if not window:  # the class knows square maps alone; its attention knows others
        layer.attn.rel_pos_h = torch.nn.Parameter(torch.empty(2 * size[0] - 1, CHANNELS // HEADS))
        layer.attn.rel_pos_w = torch.nn.Parameter(torch.empty(2 * size[1] - 1, CHANNELS // HEADS))
    layer = randomised(layer)
    x = torch.randn(2, *size, CHANNELS, dtype=torch.float64, requires_grad=True)
    hidden = x + attend(layer.layer_norm1(x), layer.attn, window)
    ours = hidden + layer.mlp(layer.layer_norm2(hidden))
    # Eager attention takes the softmax in float32 whatever the dtype.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if implementation == "eager" else {}
    compare(ours, layer(x), x, layer.parameters(), **tolerance)


@WINDOWS
def test_equals_timm(window, size):
    block = randomised(Block(CHANNELS, HEADS, use_rel_pos=True, window_size=window, input_size=size))
    x = torch.randn(2, *size, CHANNELS, dtype=torch.float64, requires_grad=True)
    hidden = x + attend(block.norm1(x), block.attn, window)
    compare(hidden + block.mlp(block.norm2(hidden)), block(x), x, block.parameters())


# ---- Bad input -----------------------------------------------------------------------------------------------------

QKV, TABLE = torch.zeros(1, 4, 6, 12), torch.zeros(3, 2)
GOOD = {"qkv": QKV, "rel_height": TABLE, "rel_width": TABLE, "num_heads": 2, "window_size": 2}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "qkv: expected a tensor .* got list", {"qkv": [1]}),
        (ValueError, r"qkv: expected 4 dimensions .* got shape \(4, 6, 12\)", {"qkv": QKV[0]}),
        (ValueError, "qkv: .* multiple of 3, got 11", {"qkv": QKV[..., :11]}),
        (ValueError, "qkv: the last dimension must be contiguous", {"qkv": torch.zeros(1, 4, 12, 6).mT}),
        (ValueError, "num_heads: 3 heads do not divide the 4 channels", {"num_heads": 3}),
        (ValueError, "num_heads: expected at least 1, got 0", {"num_heads": 0}),
        (
            ValueError,
            r"rel_height: expected shape \(3, 2\) .*window \(2, 2\).* got \(3, 4\)",
            {"rel_height": QKV[0, :3, 0, :4]},
        ),
        (ValueError, r"rel_height: expected shape \(7, 2\) .*the whole map \(4, 6\)", {"window_size": None}),
        (ValueError, r"rel_width: expected shape \(5, 2\)", {"window_size": (2, 3)}),
        (TypeError, "rel_width: expected dtype float32 .* got float64", {"rel_width": TABLE.double()}),
        (TypeError, "rel_height: .* bfloat16 or float32", {"qkv": QKV.bfloat16(), "rel_height": TABLE.half()}),
        (ValueError, "rel_width: expected the device of qkv", {"rel_width": TABLE.to("meta")}),
        (ValueError, r"pad_qkv: expected shape \(12,\)", {"pad_qkv": torch.zeros(11)}),
        (TypeError, "pad_qkv: expected dtype float32", {"pad_qkv": torch.zeros(12).half()}),
        (ValueError, "window_size: expected at least 1, got 0", {"window_size": 0}),
        (TypeError, "window_size: .* ints, got '2'", {"window_size": "2"}),
        (ValueError, "scale: expected a finite number above 0, got 0", {"scale": 0}),
        (TypeError, "scale: expected a number, got str", {"scale": "1"}),
    ],
)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.relative_attention(**{**GOOD, **change})
