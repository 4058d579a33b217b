"""The software model of the tile registers against the instructions' description, and what is computed on it."""

import ctypes
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magnet_fast import ops
from tests.ops import test_cpu_relative
from tests.ops.cases import (
    CROSS_MODAL_FORMS,
    assert_low_precision,
    in_float64,
    random_cross_modal_case,
    relative_case,
    run,
    weights_like,
    window_case,
)

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


def each(examples):
    fixtures = [HealthCheck.function_scoped_fixture]  # the tiles are the same for every example
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=fixtures)


def configuration(rows, row_bytes, palette=1):
    return struct.pack("<BB14x8H16x8B8x", palette, 0, *row_bytes, *rows)


def shape(model, height, pairs, width):
    """Tile 0 for sums, 1 for A, 2 for B."""
    rows, row_bytes = [height, height, pairs, *[0] * 5], [4 * width, 4 * pairs, 4 * width, *[0] * 5]
    model.call("loadconfig", configuration(rows, row_bytes))


def address(array):
    return ctypes.c_void_p(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())


def product(model, a, b, c):
    """a (m, 2k), b (2k, n) bfloat16 and c (m, n) float32: c + a b as the model's instruction makes it."""
    (height, depth), width = a.shape, b.shape[1]
    shape(model, height, depth // 2, width)
    paired = b.view(depth // 2, 2, width).transpose(1, 2).contiguous()  # two rows side by side
    a, c = a.contiguous(), c.clone()
    model.call("loadd", 0, address(c), ctypes.c_int64(4 * width))
    model.call("loadd", 1, address(a), ctypes.c_int64(2 * depth))
    model.call("loadd", 2, address(paired), ctypes.c_int64(4 * width))
    model.call("dpbf16ps", 0, 1, 2)
    model.call("stored", 0, address(c), ctypes.c_int64(4 * width))
    model.call("release")
    return c


def flushed(x):
    """To float32, subnormal numbers to zeros of their sign."""
    x = np.asarray(x, np.float64).astype(np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def in_order(a, b, c):
    """The same in numpy: even and odd terms apart, each step rounded to float32 and flushed."""
    a, b = (flushed(x.float().numpy()).astype(np.float64) for x in (a, b))
    halves = []
    for half in range(2):
        total = np.zeros(c.shape, np.float32)
        for k in range(half, a.shape[1], 2):  # a product of two bfloat16 numbers and a float32 sum: one rounding
            total = flushed(a[:, k : k + 1] * b[k] + total.astype(np.float64))
        halves.append(total.astype(np.float64))
    pair = flushed(halves[0] + halves[1])
    return flushed(flushed(c.numpy()).astype(np.float64) + pair.astype(np.float64))


@each(30)
@given(
    st.integers(1, 16), st.integers(1, 16), st.integers(1, 16), st.sampled_from([1.0, 1e-19, 1e-39]), st.integers(0, 99)
)
def test_product_sums_in_the_described_order(model, height, pairs, width, size, seed):
    """With numbers of every size down to products and sums that are flushed; the same bits."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, generator=generator) for n in ((height, 2 * pairs), (2 * pairs, width)))
    a, b = (size * a).to(BF16), (size * b * torch.logspace(-3, 3, width)).to(BF16)
    c = size**2 * torch.randn(height, width, generator=generator)
    np.testing.assert_array_equal(product(model, a, b, c).numpy(), in_order(a, b, c))


def test_product_adds_the_pairs_before_the_tile(model):
    """2^24 + (1 + 1) is 2^24 + 2; one by one, each 1 would be lost."""
    ones = torch.ones(1, 2, dtype=BF16)
    assert product(model, ones, ones.T, torch.tensor([[2.0**24]])) == 2**24 + 2
    assert product(model, ones[:, :1].repeat(1, 4), ones.T.repeat(2, 1), torch.tensor([[0.0]])) == 4


def test_product_of_nan_and_infinity(model):
    a = torch.tensor([[torch.inf, 1.0], [torch.nan, 0.0]], dtype=BF16)
    found = product(model, a, torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=BF16), torch.zeros(2, 2))
    assert found[0, 0] == torch.inf and found[0, 1].isnan() and found[1].isnan().all()


def test_loads_fill_with_zeros_and_stores_write_the_tile_alone(model):
    shape(model, 3, 2, 5)
    model.call("loadd", 0, address(np.arange(100, dtype=np.float32)), ctypes.c_int64(40))  # rows 10 numbers apart
    written = np.full((4, 9), -1, np.float32)
    model.call("stored", 0, address(written), ctypes.c_int64(36))
    assert (written[:3, :5] == np.arange(3)[:, None] * 10 + np.arange(5)).all()
    assert (written[3] == -1).all() and (written[:, 5:] == -1).all()
    model.call("release")


SIXTEEN = [16] * 8
FAULTS = {
    "palette 2": (configuration(SIXTEEN, [64] * 8, palette=2), "palette 2"),
    "17 rows": (configuration([17, *[16] * 7], [64] * 8), "17 rows"),
    "68 bytes": (configuration(SIXTEEN, [68, *[64] * 7]), "68 bytes"),
    "rows without bytes": (configuration(SIXTEEN, [0, *[64] * 7]), "of 0 bytes"),
    "a reserved byte": (configuration(SIXTEEN, [64] * 8)[:-1] + b"\1", "reserved byte 63"),
    "a start row": (b"\1\1" + configuration(SIXTEEN, [64] * 8)[2:], "start_row"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_configurations_fault(model, name):
    memory, message = FAULTS[name]
    with pytest.raises(RuntimeError, match=message):
        model.call("loadconfig", memory)


def test_tiles_that_do_not_fit_fault(model):
    with pytest.raises(RuntimeError, match="tile 0 is not configured"):
        model.call("zero", 0)
    shape(model, 4, 3, 5)
    for tile in range(3):
        model.call("zero", tile)
    model.call("dpbf16ps", 0, 1, 2)
    for wrong in ((0, 2, 1), (1, 0, 2)):
        with pytest.raises(RuntimeError, match="do not fit together"):
            model.call("dpbf16ps", *wrong)
    with pytest.raises(RuntimeError, match="must be three"):
        model.call("dpbf16ps", 0, 1, 1)
    with pytest.raises(RuntimeError, match="tile 3 is not configured"):
        model.call("zero", 3)
    model.call("release")
    with pytest.raises(RuntimeError, match="tile 0 is not configured"):
        model.call("stored", 0, address(torch.zeros(4, 5)), ctypes.c_int64(20))


@each(60)
@given(
    rows=st.integers(1, 64),
    columns=st.integers(1, 5).map(lambda n: 16 * n),
    pairs=st.integers(1, 40),
    transposed=st.booleans(),
    start=st.sampled_from(["zeros", "init", "itself"]),
    seed=st.integers(0, 99),
)
def test_any_product(tiles, rows, columns, pairs, transposed, start, seed):
    """Operands in the midst of NaN, sums in the midst of a mark: nothing else is read, nothing else written."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, generator=generator).to(BF16) for n in ((rows, 2 * pairs), (2 * pairs, columns)))
    words = a.view(rows, pairs, 2)
    words = words.transpose(0, 1) if transposed else words
    in_memory = torch.full((words.shape[0] + 1, words.shape[1] + 3, 2), torch.nan, dtype=BF16)
    in_memory[:-1, :-3] = words
    paired = torch.full((pairs + 1, columns + 2, 2), torch.nan, dtype=BF16)
    paired[:-1, :-2] = b.view(pairs, 2, columns).transpose(1, 2)
    init = torch.randn(rows, columns + 1, generator=generator)
    sums = torch.full((rows + 1, columns + 4), -7.0)
    if start == "itself":
        sums[:rows, :columns] = init[:, :columns]
    top = torch.empty(rows)
    a_row, a_depth = (1, in_memory.shape[1]) if transposed else (in_memory.shape[1], 1)
    first, first_row = {
        "zeros": (0, 0),
        "init": (init.data_ptr(), columns + 1),
        "itself": (sums.data_ptr(), columns + 4),
    }[start]
    numbers = [rows, columns, pairs, in_memory.data_ptr(), a_row, a_depth, paired.data_ptr(), columns + 2]
    numbers += [first, first_row, sums.data_ptr(), columns + 4, top.data_ptr()]
    tiles.call("multiply_pairs", (ctypes.c_int64 * len(numbers))(*numbers))

    expected = a.double() @ b.double() + (0 if start == "zeros" else init[:, :columns].double())
    size = a.double().abs() @ b.double().abs() + init[:, :columns].abs()
    assert ((sums[:rows, :columns] - expected).abs() <= 2**-22 * size).all()
    assert (sums[rows:] == -7).all() and (sums[:, columns:] == -7).all()
    assert torch.equal(top, sums[:rows, :columns].amax(1))
    # One instruction for every tile of sums and 16 pairs of the depth.
    assert tiles.library.products() == -(-rows // 16) * (columns // 16) * -(-pairs // 16)


def assert_agrees(case):
    """The project's rule: the reference in bfloat16 and the kernel, both measured by the reference in float64."""
    truth = run(in_float64(case), "reference")
    results = zip(run(case, "cpu"), run(case, "reference"), truth, strict=False)
    for index, (ours, plain, truth) in enumerate(results):
        assert_low_precision(ours, plain, truth, BF16, f"result {index}")


SHAPES = {
    "one tile": {"size": (4, 4), "window": (4, 4), "shift": (0, 0), "d": 32, "padding": False},
    "odd numbers": {"size": (7, 9), "window": (3, 5), "shift": (1, 2), "d": 5},
    "w 7": {"size": (15, 8), "window": (7, 7), "shift": (3, 3), "d": 32, "batch": 1},
    "w 12, padded": {"size": (15, 13), "window": (12, 12), "shift": (6, 6), "heads": 1, "d": 32, "batch": 1},
    "w 16": {"size": (17, 16), "window": (16, 16), "shift": (0, 0), "heads": 1, "d": 32, "batch": 1},
    "head_dim 1": {"size": (9, 6), "window": (4, 4), "shift": (2, 1), "d": 1},
}


@pytest.mark.parametrize("name", SHAPES)
def test_window_attention(tiles, name):
    assert_agrees(window_case(**SHAPES[name], dtype=BF16))
    assert tiles.library.products() > 0


@each(15)
@given(st.data())
def test_window_attention_for_any_sizes(tiles, data):
    window = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)), "window")
    case = window_case(
        batch=1,
        size=data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)), "size"),
        window=window,
        shift=tuple(data.draw(st.integers(0, side - 1), "shift") for side in window),
        heads=data.draw(st.integers(1, 2), "heads"),
        d=data.draw(st.integers(1, 50), "d"),
        padding=data.draw(st.booleans(), "padding"),
        pad_first=data.draw(st.booleans(), "pad_first"),
        dtype=BF16,
    )
    assert_agrees(case)


@pytest.mark.parametrize("which", range(3), ids=["qkv", "bias_table", "pad_qkv"])
def test_one_gradient_of_window_attention_alone(tiles, which):
    case = window_case(**SHAPES["odd numbers"], dtype=BF16)
    with ops.backend("cpu"):
        together = case.gradients()[which]
        leaves = [leaf if i == which else leaf.detach() for i, leaf in enumerate(case.leaves)]
        alone = torch.autograd.grad(case(*leaves)[0], leaves[which], weights_like(*case()))[0]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("form", CROSS_MODAL_FORMS)
def test_cross_modal_attention(tiles, form):
    for sizes in ({"pixels": 37, "words": 7}, {"pixels": 150, "words": 20, "heads": 1, "d": 70, "dv": 50, "dw": 36}):
        assert_agrees(random_cross_modal_case(form, **sizes, dtype=BF16))
    assert tiles.library.products() > 0


# The models take their time: the smallest map of several blocks.
RELATIVE_SHAPES = {
    **test_cpu_relative.SHAPES,
    "blocks of keys": {"size": (20, 17), "window": None, "heads": 1, "d": 20},
}


@pytest.mark.parametrize("name", RELATIVE_SHAPES)
def test_relative_attention(tiles, name):
    assert_agrees(relative_case(**RELATIVE_SHAPES[name], dtype=BF16))
    assert tiles.library.products() > 0
