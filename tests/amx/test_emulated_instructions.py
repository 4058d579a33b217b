"""The software model of AVX-512 against the instructions' descriptions, written again in numpy."""

import ctypes
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .test_emulated_tiles import each, flushed

pytestmark = pytest.mark.slow

EDGES = np.array([0, -0.0, 1e-39, -1e-39, 1.17549435e-38, 1, -2, 3e38, np.inf, -np.inf, np.nan], np.float32)


def address(array):
    return ctypes.c_void_p(array.ctypes.data)


def result(model, name, *operands, dtype=np.float32):
    """What an instruction makes of vectors of 64 bytes."""
    to = np.empty(64 // np.dtype(dtype).itemsize, dtype)
    getattr(model.library, name)(*(o if isinstance(o, ctypes.c_uint32) else address(o) for o in operands), address(to))
    return to


def numbers(seed, count=16, size=1.0):
    """Random ones, among them the edges."""
    generator = np.random.default_rng(seed)
    found = (size * generator.standard_normal(count)).astype(np.float32)
    places = generator.choice(count, 4, replace=False)
    found[places] = generator.choice(EDGES, 4)
    return found


def bfloat16(x):
    return torch.from_numpy(x).bfloat16()


def bits(x):
    return x.view(torch.int16).numpy()


@each(40)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 1e-19]))
def test_products_of_pairs(model, seed, size):
    """Odd numbers first; subnormal numbers and results are zeros."""
    a, b = (bfloat16(numbers(seed + i, 32, size)) for i in range(2))
    start = numbers(seed + 2, 16, size**2)
    wide = [flushed(x.float().numpy()).astype(np.float64) for x in (a, b)]
    with np.errstate(invalid="ignore", over="ignore"):
        expected = flushed(flushed(start) + wide[0][1::2] * wide[1][1::2])
        expected = flushed(expected + wide[0][::2] * wide[1][::2])
    np.testing.assert_array_equal(result(model, "vdpbf16ps", start, bits(a), bits(b)), expected)


def test_products_of_pairs_add_one_by_one(model):
    """1 + 2^24 - 2^24, the odd number being the 2^24: the 1 is lost before it is left over."""
    a = torch.tensor([-(2.0**24), 2.0**24] * 16).bfloat16()
    ones, start = torch.ones(32).bfloat16(), np.ones(16, np.float32)
    assert (result(model, "vdpbf16ps", start, bits(a), bits(ones)) == 0).all()


@each(40)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 1e30, 1e-38]))
def test_rounding_to_pairs(model, seed, size):
    """torch rounds in the same way, but keeps subnormal numbers. The second operand comes first."""
    high, low = (numbers(seed + i, 16, size) for i in range(2))
    found = result(model, "vcvtne2ps2bf16", high, low, dtype=np.int16)
    expected = bits(bfloat16(flushed(np.concatenate([low, high])).astype(np.float32)))
    nan = np.isnan(np.concatenate([low, high]))
    assert ((found == expected) | nan).all()
    assert torch.from_numpy(found[nan]).view(torch.bfloat16).isnan().all()


@each(40)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 30.0, 300.0]))
def test_scaling_by_powers(model, seed, size):
    a, b = numbers(seed), numbers(seed + 1, 16, size)
    with np.errstate(all="ignore"):
        expected = np.ldexp(a.astype(np.float64), np.clip(np.floor(np.nan_to_num(b)), -900, 900).astype(int))
        expected = np.where(np.isnan(b), np.nan, expected.astype(np.float32))
        expected[np.isinf(a) & (b == -np.inf) | (a == 0) & (b == np.inf)] = np.nan
    np.testing.assert_array_equal(result(model, "vscalefps", a, b), expected)


@each(20)
@given(st.integers(0, 10_000))
def test_rounding_to_whole_numbers(model, seed):
    v = numbers(seed, 16, 50.0)
    np.testing.assert_array_equal(result(model, "vrndscaleps", v), np.rint(v))
    with np.errstate(invalid="ignore"):
        rest = np.where(np.isinf(v), 0, v - np.floor(v))
    np.testing.assert_array_equal(result(model, "vreduceps", v), rest)


def test_permutation_takes_the_low_bits_of_a_place(model):
    places = np.random.default_rng(0).integers(0, 2**16, 32, dtype=np.uint16)
    v = np.arange(100, 132, dtype=np.uint16)
    np.testing.assert_array_equal(result(model, "vpermw", places, v, dtype=np.uint16), v[places % 32])


def test_masks_leave_the_rest_alone(model):
    """Of memory before a page that may not be touched, and of what is written."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    array = np.frombuffer(memory, np.uint8)
    array[:page] = np.arange(page) % 251
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(array.ctypes.data + page), ctypes.c_size_t(page), 0) == 0
    for size, name, most in ((4, "load_words", 16), (2, "load_halves", 32)):
        for count in range(1, most):
            end = array[page - size * count : page]
            found = result(model, name, end, ctypes.c_uint32((1 << count) - 1), dtype=np.uint8)
            assert (found[: end.size] == end).all() and not found[end.size :].any()
    for count in range(1, 16):
        array[:page] = 7
        given = np.full(64, 9, np.uint8)
        model.library.store_words(address(given), ctypes.c_uint32((1 << count) - 1), address(array[page - 4 * count :]))
        assert (array[page - 4 * count : page] == 9).all() and (array[: page - 4 * count] == 7).all()
