"""Cross-modal attention's Triton and CUDA kernels on the device, against the reference in float64 on the CPU."""

import pytest
import torch

from tests.kernels.test_cross_modal_attention import random_case
from tests.ops.cases import CROSS_MODAL_FORMS

from .device import assert_agrees, assert_captured, assert_same_bits, backends_of

BACKENDS = backends_of("cross_modal_attention")
FORMS = pytest.mark.parametrize("form", CROSS_MODAL_FORMS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SHAPES = {
    "8 heads of 32": {"batch": 2, "pixels": 900, "words": 20, "heads": 8, "widths": (32, 32, 32)},
    "one head of 128": {"batch": 2, "pixels": 3600, "words": 22, "widths": (128, 128, 128)},
    "one head of 1024": {"batch": 2, "pixels": 225, "words": 20, "widths": (1024, 1024, 1024)},
    "many words": {"batch": 2, "pixels": 300, "words": 64, "heads": 2, "widths": (48, 32, 160), "mask": "empty"},
    "one pixel, one word": {"pixels": 1, "words": 1, "mask": "none"},
    "odd numbers": {"batch": 3, "pixels": 37, "words": 5, "heads": 3, "widths": (8, 5, 13), "mask": "empty"},
}


@BACKENDS
@FORMS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(form, shape, dtype, backend):
    assert_agrees(random_case(form, **SHAPES[shape], dtype=dtype), backend)


@BACKENDS
@pytest.mark.parametrize("shape", ["8 heads of 32", "one head of 1024"])
def test_same_bits_over_and_over(shape, backend):
    assert_same_bits(random_case("shared", **SHAPES[shape], dtype=torch.bfloat16), backend)


@BACKENDS
@pytest.mark.parametrize("shape", ["8 heads of 32", "one head of 1024"])
def test_cuda_graph_without_synchronisation(shape, backend):
    assert_captured(random_case("shared", **SHAPES[shape], dtype=torch.bfloat16), backend)


@BACKENDS
def test_same_bits_ten_thousand_times(backend):
    assert_same_bits(random_case("shared", **SHAPES["8 heads of 32"], dtype=torch.bfloat16), backend, times=10_000)
