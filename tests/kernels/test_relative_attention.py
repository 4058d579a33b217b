"""Relative attention's Triton kernels in the interpreter, against the reference in float64."""

import pytest
import torch
from magnet_fast.kernels import relative_attention

from magnet_fast import ops
from magnet_fast.ops import _triton_relative
from tests.ops.cases import Case, relative_case

from .agreement import assert_accurate, assert_each_gradient_alone, assert_registered, in_float64, run

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
NAMES = ("output", "gradient of qkv", "gradient of rel_height", "gradient of rel_width", "gradient of pad_qkv")
# Blocks of keys have 16, 32 or 64 columns and as many rows as make 16 to 64 keys of them; tiles have 16 to 64 queries.
SHAPES = {
    "windows": {"size": (5, 4), "window": (2, 3), "d": 8},
    "window larger than the map": {"size": (3, 2), "window": (5, 4), "d": 16},
    "nothing padded": {"size": (4, 6), "window": (4, 3), "d": 5},
    "map": {"size": (3, 5), "window": None, "d": 8},
    "tall map": {"size": (18, 2), "window": None, "d": 4},
    "one token": {"size": (1, 1), "window": None, "d": 2},
}
# Several tiles of queries, rows and columns of blocks.
LARGE = {
    "window": {"size": (6, 15), "window": (6, 14), "d": 4},
    "columns of 16": {"size": (2, 33), "window": None, "d": 4},
    "columns of 32": {"size": (4, 20), "window": None, "d": 4},
    "columns of 64": {"size": (2, 50), "window": None, "d": 4},
}


def small(**options):
    return relative_case(**{"batch": 1, "heads": 1, "dtype": torch.float32, **options})


def assert_agrees(case):
    results = run(case, "triton"), run(case, "reference"), run(in_float64(case), "reference")
    assert all(ours.is_contiguous() for ours in results[0])
    assert_accurate(*results, case.leaves[0].dtype)


def assert_near(case):
    """float32 within a few roundings of the largest value; half the price of `assert_agrees`."""
    for name, ours, exact in zip(NAMES, run(case, "triton"), run(in_float64(case), "reference"), strict=False):
        error, scale = (ours - exact).abs().max().item(), exact.abs().max().item()
        assert error <= 2e-6 * max(1.0, scale), f"{name}: {error}"


@DTYPES
@pytest.mark.parametrize(("batch", "heads", "shape"), [(1, 2, "windows"), (2, 1, "map")])
def test_agrees_with_the_reference(batch, heads, shape, dtype):
    assert_agrees(small(**SHAPES[shape], batch=batch, heads=heads, dtype=dtype))


@pytest.mark.parametrize("shape", LARGE)
def test_many_blocks(shape):
    assert_agrees(small(**LARGE[shape], dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", ["window", "columns of 16"])
def test_many_blocks_in_float32(shape):
    assert_near(small(**LARGE[shape]))


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_in_float32(shape):
    assert_near(small(**SHAPES[shape]))


@pytest.mark.parametrize("shape", ["windows", "window larger than the map"])
def test_padding_of_zeros(shape):
    assert_near(small(**SHAPES[shape], padding=False))


@pytest.mark.parametrize(("d", "dtype"), [(33, torch.float32), (80, torch.bfloat16), (128, torch.float16)], ids=str)
def test_wide_heads(d, dtype):
    assert_agrees(small(size=(2, 4), window=(2, 3), d=d, dtype=dtype))


def test_tables_in_float32():
    case = small(**SHAPES["windows"], dtype=torch.bfloat16)
    case.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in case.leaves[1:]]
    assert_agrees(case)


def test_every_padding_residue():
    for height, width in ((2, 3), (3, 4), (4, 2)):
        assert_near(small(size=(height, width), window=(3, 3)))


@pytest.mark.parametrize("size, window", [((2, 4), (2, 3)), ((2, 18), None)], ids=["windows", "columns of blocks"])
def test_one_gradient_at_a_time(size, window):
    assert_each_gradient_alone(small(size=size, window=window, d=4, dtype=torch.bfloat16))


def test_same_bits_twice():
    case = small(size=(5, 4), window=(3, 3), d=16, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(case, "triton"), run(case, "triton"), strict=True))


def test_views():
    """A slice of a wider tensor, of every other image, tables turned around, and a gradient of no strides."""
    case = small(batch=4, size=(3, 4), window=(2, 3), d=8)
    qkv, height, width, pad = (leaf.detach() for leaf in case.leaves)
    wide = torch.full((4, 3, 6, qkv.shape[3] + 9), torch.nan)
    wide[:, :, :4, 4:-5] = qkv
    view = wide[::2, :, :4, 4:-5]
    tables = [table.t().contiguous().t() for table in (height, width)]
    assert not any(tensor.is_contiguous() for tensor in (view, *tables))
    results = []
    with ops.backend("triton"):
        for given in ((view, *tables, pad), (qkv[::2].contiguous(), height, width, pad)):
            leaves = [tensor.requires_grad_() for tensor in given]
            out = Case(case.operator, leaves, case.arguments)()[0]
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_nan_stays_in_its_window():
    case = small(size=(4, 6), window=(4, 3), d=4)
    case.leaves[0].data[0, 1, 1, 5] = torch.nan  # of a key
    out, grad, *_ = run(case, "triton")
    for tensor in (out, grad):
        assert tensor[:, :, :3].isnan().any() and tensor[:, :, 3:].isfinite().all()
    plain = run(case, "reference")[0]
    assert torch.equal(out.isnan(), plain.isnan())


def test_large_logits():
    case = small(size=(3, 4), window=None, d=8)
    case.leaves[0].data *= 30
    results = run(case, "triton")
    assert all(result.isfinite().all() for result in results)
    torch.testing.assert_close(results[0], run(case, "reference")[0], rtol=1e-3, atol=1e-3)


def test_registered_for_compilation():
    case = small(size=(2, 4), window=(2, 3), d=8, dtype=torch.bfloat16)
    assert_registered(case)
    with ops.backend("triton"):
        compiled = torch.compile(lambda *leaves: case(*leaves)[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*case.leaves), case()[0])


def test_auto_never_takes_the_interpreter():
    args, kwargs = (case := small()).arguments(*case.leaves)
    explanation = ops.explain("relative_attention", *args, **kwargs)
    assert explanation.chosen != "triton"
    assert "interpreter is for tests" in explanation.reasons["triton"]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype float64 is not supported", {"dtype": torch.float64}),
        ("130 channels a head are not supported, at most 128", {"d": 130, "dtype": torch.bfloat16}),
        ("66 channels a head are not supported in float32, at most 64", {"d": 66}),
    ],
)
def test_what_the_kernels_do_not_take(reason, change):
    with ops.backend("triton"), pytest.raises(ops.BackendError, match=reason):
        small(**change)()


def test_limits_are_the_kernels():
    assert _triton_relative._LARGEST_HEAD == relative_attention.LARGEST_HEAD
    assert _triton_relative._LARGEST_HEAD_OF_FLOAT32 == relative_attention.LARGEST_HEAD_OF_FLOAT32
    assert _triton_relative._LARGEST_IMAGE == relative_attention.LARGEST_IMAGE
    huge, table = torch.empty(24).expand(1, 40_000, 30_000, 24), torch.zeros(3, 8)
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="an image of 28800000000 numbers"):
        ops.relative_attention(huge, table, table, num_heads=1, window_size=2)
    large = torch.empty(3).expand(1, 2000, 1500, 3)
    tables = [torch.zeros(2 * side - 1, 1) for side in (2000, 1500)]
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="6000000000 products of a head with a table"):
        ops.relative_attention(large, *tables, num_heads=1)
