"""Window attention's CUDA kernels, emulated, against the reference."""

import pytest
import torch

from magnet_fast.ops import _cuda_window
from magnet_fast.ops._view import view
from magnet_fast.ops._window_settings import WindowSettings

from ..ops.cases import weighted_sum, window_case
from .agreement import assert_agrees, results

pytestmark = pytest.mark.slow

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
ORDERS = pytest.mark.parametrize("pad_first", [True, False], ids=["pad first", "roll first"])
SHAPES = {
    "w 7": {"size": (9, 8), "window": (7, 7), "shift": (3, 3), "heads": 1, "d": 32, "batch": 1},
    "w 8": {"size": (11, 8), "window": (8, 8), "shift": (4, 2), "heads": 1, "d": 16, "batch": 1},
    "odd sizes, heads of 5": {"size": (5, 7), "window": (2, 5), "shift": (1, 2), "heads": 2, "d": 5},
    "heads of 64, one shift": {"size": (6, 4), "window": (4, 4), "shift": (0, 1), "heads": 2, "d": 64, "batch": 1},
    "one token": {"size": (2, 3), "window": (1, 1), "shift": (0, 0), "heads": 3, "d": 8},
    "map smaller than its window": {"size": (2, 3), "window": (5, 6), "shift": (2, 3), "heads": 2, "d": 24, "batch": 3},
}


@ORDERS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(emulated, shape, dtype, pad_first):
    assert_agrees(window_case(**SHAPES[shape], pad_first=pad_first, dtype=dtype), emulated, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_w_12(emulated, dtype):
    """Three turns over the keys, in 16 bits; 144 queries and keys."""
    case = window_case(size=(12, 15), window=(12, 12), shift=(6, 6), heads=1, d=32, batch=1, dtype=dtype)
    assert_agrees(case, emulated, dtype)


def test_256_tokens(emulated):
    """The largest window; its sums of the bias's gradients do not fit in shared memory."""
    case = window_case(size=(16, 16), window=(16, 16), shift=(0, 0), heads=1, d=16, batch=1, dtype=torch.bfloat16)
    assert_agrees(case, emulated, torch.bfloat16)


@DTYPES
def test_without_a_padding_token(emulated, dtype):
    case = window_case(size=(5, 6), window=(4, 4), shift=(2, 2), d=16, padding=False, dtype=dtype)
    assert_agrees(case, emulated, dtype)


def test_bias_sums_in_global_memory_are_the_same(emulated):
    case = window_case(**SHAPES["w 7"], dtype=torch.bfloat16)
    expected = results(case, "cuda")
    emulated.device.set_shared_limit(52 * 1024)
    assert all(torch.equal(a, b) for a, b in zip(results(case, "cuda"), expected, strict=True))


@pytest.mark.parametrize("which", range(3), ids=["qkv", "bias_table", "pad_qkv"])
def test_one_gradient_at_a_time(emulated, which):
    case = window_case(size=(5, 6), window=(4, 4), shift=(2, 1), d=16, dtype=torch.bfloat16)
    together = results(case, "cuda")[1 + which]
    leaves = [leaf if i == which else leaf.detach() for i, leaf in enumerate(case.leaves)]
    (alone,) = torch.autograd.grad(weighted_sum(case.registered("cuda")(*leaves)), leaves[which])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("offset", [8, 3], ids=["aligned", "not aligned"])
def test_views(emulated, offset):
    """A slice of a wider tensor, every second image; what lies around it is not read and not written."""
    case = window_case(size=(5, 6), window=(4, 4), shift=(2, 1), d=16, dtype=torch.bfloat16)
    qkv = case.leaves[0].detach()
    wide = torch.full((4, 5, 6, 128), torch.nan, dtype=qkv.dtype)
    view = wide[::2, :, :, offset : offset + 96]
    view.copy_(qkv)
    view = view.requires_grad_()
    out = case.registered("cuda")(view, *case.leaves[1:])[0]
    expected = results(case, "cuda")
    assert torch.equal(out, expected[0])
    (grad,) = torch.autograd.grad(weighted_sum((out,)), view)
    assert torch.equal(grad, expected[1])


def test_gradients_written_stay_within_their_tensor(emulated):
    """Strided results, written between NaN."""
    case = window_case(size=(5, 6), window=(4, 4), shift=(2, 1), d=16, padding=False, dtype=torch.float32)
    qkv, table = (leaf.detach() for leaf in case.leaves)
    arguments = case.normalised()
    wide = torch.full((2, 5, 6, 40), torch.nan)
    emulated.extension.window_attention_forward(
        out=view(wide[..., 4:36]), **_cuda_window._inputs(qkv, table, None, arguments[3:])
    )
    assert torch.equal(wide[..., 4:36], case.registered("cuda")(qkv, table)[0])
    assert wide[..., :4].isnan().all() and wide[..., 36:].isnan().all()


def test_tf32_only_where_torch_allows_it(emulated):
    case = window_case(size=(5, 6), window=(4, 4), shift=(2, 1), d=16, dtype=torch.float32)
    exact, reference = results(case, "cuda"), results(case, "reference")
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = results(case, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    for ours, tf32, plain in zip(exact, rounded, reference, strict=True):
        scale = plain.abs().max()
        assert (ours - plain).abs().max() < 1e-5 * scale
        assert 1e-6 * scale < (tf32 - plain).abs().max() < 5e-3 * scale


def test_extreme_logits(emulated):
    """Weights that vanish, and -infinity in the table: nothing overflows, no key of weight 0 is seen."""
    case = window_case(size=(6, 7), window=(4, 4), shift=(2, 2), d=8, dtype=torch.float32)
    case.leaves[1].data[:20] = -torch.inf
    case.leaves[1].data[20:] *= 300
    for ours, plain in zip(results(case, "cuda"), results(case, "reference"), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-3 * plain.abs().max().item())


STRIDES = (2880, 576, 96, 1)
BAD = {
    "qkv: dtype": {"qkv": (64, (2, 5, 6, 96), STRIDES, 3)},
    "qkv: no address": {"qkv": (0, (2, 5, 6, 96), STRIDES, 0)},
    "qkv: batch": {"qkv": (64, (-1, 5, 6, 96), STRIDES, 0)},
    "qkv: height": {"qkv": (64, (2, 0, 6, 96), STRIDES, 0)},
    "qkv: width": {"qkv": (64, (2, 5, 2**30, 96), STRIDES, 0)},
    "qkv: no third": {"qkv": (64, (2, 5, 6, 95), STRIDES, 0)},
    "qkv: strides": {"qkv": (64, (2, 5, 6, 96), (2880, -1, 96, 1), 0)},
    "bias: alignment": {"bias": (66, (49, 2), (2, 1), 0)},
    "bias: sizes": {"bias": (64, (48, 2), (2, 1), 0)},
    "pad_qkv: dtype": {"pad_qkv": (64, (96,), (1,), 1)},
    "out: alignment": {"out": (65, (2, 5, 6, 32), (960, 192, 32, 1), 0)},
    "out: tokens overlap": {"out": (64, (2, 5, 6, 32), (960, 192, 31, 1), 0)},
    "heads: 0": {"num_heads": 0},
    "heads: no divisor": {"num_heads": 3},
    "window_h": {"window_h": 300},
    "shift_h": {"shift_h": 4},
    "shift_w": {"shift_w": -1},
    "scale": {"scale": float("nan")},
}


@pytest.mark.parametrize("name", BAD)
def test_the_launcher_refuses(emulated, name):
    case = window_case(size=(5, 6), window=(4, 4), shift=(2, 1), d=16, dtype=torch.float32)
    qkv, table, pad, *settings = case.normalised()
    changes, settings = dict(BAD[name]), WindowSettings(*settings)
    settings = settings._replace(**{key: changes.pop(key) for key in list(changes) if key in settings._fields})
    out = torch.full((2, 5, 6, 32), 7.0)
    call = {**_cuda_window._inputs(qkv, table, pad, settings), "out": view(out), **changes}
    with pytest.raises(ValueError, match=f"^{name.partition(':')[0]}: expected"):
        emulated.extension.window_attention_forward(**call)
    assert (out == 7.0).all()
