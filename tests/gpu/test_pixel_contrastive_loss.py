"""The pixel contrastive loss's Triton kernels on the device, against the reference in float64 on the CPU."""

import pytest
import torch

from tests.kernels.test_pixel_contrastive_loss import random_case

from .device import assert_agrees, assert_captured, assert_same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SHAPES = {
    "a map of the model": {"batch": 2, "pixels": 900, "channels": 256},
    "many channels": {"pixels": 300, "channels": 520},
    "odd numbers": {"batch": 3, "pixels": 37, "channels": 24},
    "not normalised": {"pixels": 150, "channels": 20, "normalize": False, "temperature": 5.0},
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees(shape, dtype):
    assert_agrees(random_case(**SHAPES[shape], dtype=dtype), "triton")


@DTYPES
def test_same_bits_over_and_over(dtype):
    assert_same_bits(random_case(**SHAPES["a map of the model"], dtype=dtype), "triton")


def test_cuda_graph_without_synchronisation():
    assert_captured(random_case(**SHAPES["odd numbers"], dtype=torch.bfloat16), "triton")
