"""Operators at levels avx512 and avx512_bf16 on the software model of AVX-512, by the rules of the levels that the
processor has. Level amx: test_emulated_tiles.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_fast import ops
from tests.ops import test_cpu_deformable, test_cpu_relative, test_cpu_window_dtypes
from tests.ops.cases import (
    CROSS_MODAL_FORMS,
    random_cross_modal_case,
    random_deformable_case,
    relative_case,
    window_case,
)

from .test_emulated_tiles import RELATIVE_SHAPES, assert_agrees, each

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
RELATIVE = pytest.mark.parametrize(
    ("level", "dtype"),
    [("avx512", torch.float32), ("avx512", torch.float16), ("avx512_bf16", BF16)],
    ids=["avx512-float32", "avx512-float16", "avx512_bf16-bfloat16"],
)


@RELATIVE
@pytest.mark.parametrize("shape", RELATIVE_SHAPES)
def test_relative_attention(emulated, shape, level, dtype):
    emulated.set_simd_level(level)
    test_cpu_relative.assert_agrees(relative_case(**RELATIVE_SHAPES[shape], dtype=dtype))


@each(40)
@given(st.data())
def test_relative_attention_for_any_sizes(emulated, data):
    level, dtype = data.draw(st.sampled_from([("avx512", BF16), ("avx512_bf16", BF16), ("amx", BF16)]), "level")
    emulated.set_simd_level(level)
    test_cpu_relative.assert_agrees(test_cpu_relative.any_case(data, dtype))


def test_relative_attention_with_more_keys_than_fit(emulated):
    """The backward pass takes 32 queries at a time; most of the keys are padding."""
    emulated.set_simd_level("amx")
    assert_agrees(relative_case(batch=1, size=(9, 6), window=(72, 31), heads=1, d=4, dtype=BF16))


@pytest.mark.parametrize("level", ["avx512_bf16", "amx"])
def test_relative_attention_with_extreme_positions(emulated, level):
    """Logits of thousands that grow from block to block: the running maximum moves, sums of rounded weights with it."""
    emulated.set_simd_level(level)
    case = relative_case(batch=1, size=(40, 8), window=None, heads=1, d=4, dtype=BF16)
    with torch.no_grad():
        case.leaves[1][:] = torch.linspace(300, -300, 79)[:, None]
    assert_agrees(case)


@pytest.mark.parametrize("level", ["avx512_bf16", "amx"])
def test_relative_attention_with_tables_in_float32(emulated, level):
    emulated.set_simd_level(level)
    case = relative_case(**test_cpu_relative.SHAPES["odd numbers"], dtype=BF16)
    case.leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in case.leaves[1:]]
    assert_agrees(case)


@pytest.mark.parametrize("level", ["avx512_bf16", "amx"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_window(emulated, level, bad):
    emulated.set_simd_level(level)
    test_cpu_relative.assert_bad_stays(relative_case(batch=1, size=(7, 9), window=(4, 5), d=8, dtype=BF16), bad)


@pytest.mark.parametrize("level", ["avx512_bf16", "amx"])
def test_same_bits_however_queries_are_shared(emulated, level):
    """The launcher cuts the queries of a forward pass by the number of threads."""
    emulated.set_simd_level(level)
    case = relative_case(batch=1, size=(40, 56), window=None, heads=1, d=4, dtype=BF16)
    before = torch.get_num_threads()
    outs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with ops.backend("cpu"):
                outs += case()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


@pytest.mark.parametrize("which", range(4), ids=test_cpu_relative.NAMES[1:])
def test_one_gradient_of_relative_attention_alone(emulated, which):
    emulated.set_simd_level("avx512_bf16")
    test_cpu_relative.assert_alone(relative_case(size=(5, 4), window=(3, 3), d=6, dtype=BF16), which)


def test_relative_attention_of_views(emulated):
    emulated.set_simd_level("avx512_bf16")
    test_cpu_relative.assert_same_in_views(relative_case(size=(9, 7), window=(4, 4), d=6, dtype=BF16))


@pytest.mark.parametrize("shape", test_cpu_window_dtypes.SHAPES)
def test_window_attention(emulated, shape):
    emulated.set_simd_level("avx512_bf16")
    assert_agrees(window_case(**{**test_cpu_window_dtypes.SHAPES[shape], "batch": 1}, dtype=BF16))


@pytest.mark.parametrize("form", CROSS_MODAL_FORMS)
def test_cross_modal_attention(emulated, form):
    emulated.set_simd_level("avx512_bf16")
    for sizes in ({"pixels": 37, "words": 7}, {"pixels": 150, "words": 20, "heads": 1, "d": 70, "dv": 50, "dw": 36}):
        assert_agrees(random_cross_modal_case(form, **sizes, dtype=BF16))


@pytest.mark.parametrize("d", [3, 20, 32, 64])
def test_deformable_attention(emulated, d):
    """Up to half a vector, two halves, and a multiple of 32 channels, which are multiplied in pairs."""
    emulated.set_simd_level("avx512_bf16")
    case = random_deformable_case(d=d, queries=20, dtype=BF16)
    test_cpu_deformable.assert_low(case)
