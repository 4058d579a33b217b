"""The C++ kernels of the pixel contrastive loss at the extension's edge."""

from __future__ import annotations

import pytest
import torch

from magnet_fast import _cpu
from magnet_fast.ops._view import view

BATCH, PIXELS, CHANNELS = 2, 5, 3


class Call:
    """Arguments of both passes for small tensors, results not written yet."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        real = torch.float64 if dtype == torch.float64 else torch.float32
        self.features = torch.randn(BATCH, PIXELS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.inside = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
        self.loss = torch.full((BATCH,), torch.nan, dtype=real)
        self.statistics = torch.full((BATCH, 4, PIXELS), torch.nan, dtype=real)
        self.grad_loss = torch.ones(BATCH, dtype=real)
        self.grad = torch.full_like(self.features, torch.nan)
        self.common = {
            "features": view(self.features),
            "inside": view(self.inside),
            "statistics": view(self.statistics),
            "temperature": 0.5,
            "normalize": True,
            "threads": 1,
        }

    def forward(self, **changes: object) -> None:
        _cpu.pixel_contrastive_loss_forward(**{"loss": view(self.loss), **self.common, **changes})

    def backward(self, **changes: object) -> None:
        own = {"grad_loss": view(self.grad_loss), "grad_features": view(self.grad)}
        _cpu.pixel_contrastive_loss_backward(**{**own, **self.common, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_written(dtype):
    call = Call(dtype)
    call.forward()
    call.backward()
    assert (call.statistics[:, ::2] > 0).all() and not call.statistics.isnan().any()
    assert (call.loss > 0).all() and call.grad.isfinite().all() and call.grad.any(2).all()


SIZES, STRIDES, MOST = (BATCH, PIXELS, CHANNELS), (15, 3, 1), 2**31 - 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", (64, (-1, PIXELS, CHANNELS), STRIDES, 0), "features: expected sizes of at least 0, got -1"),
        ("features", (64, (BATCH, 0, CHANNELS), STRIDES, 0), "features: expected 1 .. 2"),
        ("features", (64, (BATCH, 2**31, CHANNELS), STRIDES, 0), "features: expected 1 .. 2"),
        ("features", (64, (BATCH, PIXELS, 0), STRIDES, 0), "features: expected 1 .. 2"),
        ("features", (64, (MOST, MOST, MOST), STRIDES, 0), "features: expected .* to be addressable"),
        ("features", (64, SIZES[:2], STRIDES[:2], 0), "features: expected a tensor of 3 dimensions, got 2"),
        ("features", (64, SIZES, (15, -3, 1), 0), "features: expected strides of at least 0, got -3"),
        ("features", (64, SIZES, STRIDES, 4), "features: expected dtype 0 .float32.*got 4"),
        ("features", (0, SIZES, STRIDES, 0), "features: expected the address of a tensor"),
        ("features", (66, SIZES, STRIDES, 0), "features: expected an address aligned"),
        ("features", None, "features: expected a tensor of 3 dimensions, got 0"),
        ("threads", 0, "threads: expected 1 .. 4096, got 0"),
        ("threads", 5000, "threads: expected 1 .. 4096, got 5000"),
        ("temperature", 0.0, "temperature: expected a finite number above 0"),
        ("temperature", -1.0, "temperature: expected a finite number above 0"),
        ("temperature", float("nan"), "temperature: expected a finite number above 0"),
        ("temperature", float("inf"), "temperature: expected a finite number above 0"),
        ("inside", (0, SIZES[:2], (5, 1), 4), "inside: expected the address of a tensor"),
        ("inside", (64, SIZES[:2], (5, 1), 5), "inside: expected dtype 4"),
        ("inside", (64, SIZES[:2], (10, 2), 4), "inside: expected stride 1 in dimension 1, got 2"),
        ("statistics", (0, (BATCH, 4, PIXELS), (20, 5, 1), 0), "statistics: expected the address of a tensor"),
        ("statistics", (64, (BATCH, 3, PIXELS), (15, 5, 1), 0), "statistics: expected size 4 in dimension 1, got 3"),
    ],
)
def test_bad_arguments(name, value, message):
    call = Call()
    for run in (call.forward, call.backward):
        with pytest.raises(ValueError, match=message):
            run(**{name: value})
    assert call.loss.isnan().all() and call.grad.isnan().all()


def test_bad_results():
    call = Call()
    with pytest.raises(ValueError, match="loss: expected a tensor of 1 dimensions"):
        call.forward(loss=None)
    with pytest.raises(ValueError, match="loss: expected dtype 0"):
        call.forward(loss=(64, (BATCH,), (1,), 3))
    with pytest.raises(ValueError, match="grad_loss: expected the address"):
        call.backward(grad_loss=(0, (BATCH,), (1,), 0))
    with pytest.raises(ValueError, match="grad_features: expected stride 3 in dimension 1, got 4"):
        call.backward(grad_features=(64, SIZES, (20, 4, 1), 0))
    assert call.loss.isnan().all() and call.grad.isnan().all()


def test_statistics_of_the_forward_are_what_the_backward_reads():
    call = Call()
    call.forward()
    call.backward()
    first = call.grad.clone()
    call.statistics[:, ::2] *= 2  # sums: the gradient's factors are inverse to them
    call.backward()
    torch.testing.assert_close(call.grad, first / 2)


def test_no_images():
    call = Call()
    tensors = (call.features, call.inside, call.statistics, call.loss, call.grad_loss, call.grad)
    features, inside, statistics, loss, grad_loss, grad = (view(tensor[:0]) for tensor in tensors)
    inputs = {"features": features, "inside": inside, "statistics": statistics}
    call.forward(loss=loss, **inputs)
    call.backward(grad_loss=grad_loss, grad_features=grad, **inputs)
    assert call.loss.isnan().all() and call.grad.isnan().all()


def test_low_precision_needs_only_its_own_alignment():
    aligned, shifted = Call(torch.bfloat16), Call(torch.bfloat16)
    storage = torch.empty(shifted.features.numel() + 1, dtype=torch.bfloat16)
    storage[1:] = shifted.features.flatten()
    aligned.forward()
    shifted.forward(features=view(storage[1:].view_as(shifted.features)))
    assert torch.equal(aligned.loss, shifted.loss)
