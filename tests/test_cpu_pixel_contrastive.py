"""The C++ kernels of the pixel contrastive loss at the extension's edge."""

from __future__ import annotations

import pytest
import torch

from magnet_fast import _cpu

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
            "features_ptr": self.features.data_ptr(),
            "features_strides": self.features.stride(),
            "inside_ptr": self.inside.data_ptr(),
            "statistics_ptr": self.statistics.data_ptr(),
            "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64].index(dtype),
            "batch": BATCH,
            "pixels": PIXELS,
            "channels": CHANNELS,
            "temperature": 0.5,
            "normalize": True,
            "threads": 1,
        }

    def forward(self, **changes: object) -> None:
        _cpu.pixel_contrastive_loss_forward(**{"loss_ptr": self.loss.data_ptr(), **self.common, **changes})

    def backward(self, **changes: object) -> None:
        own = {"grad_loss_ptr": self.grad_loss.data_ptr(), "grad_features_ptr": self.grad.data_ptr()}
        _cpu.pixel_contrastive_loss_backward(**{**own, **self.common, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_written(dtype):
    call = Call(dtype)
    call.forward()
    call.backward()
    assert (call.statistics[:, ::2] > 0).all() and not call.statistics.isnan().any()
    assert (call.loss > 0).all() and call.grad.isfinite().all() and call.grad.any(2).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch", -1, "batch: expected 0 .. 2"),
        ("pixels", 0, "pixels: expected 1 .. 2"),
        ("pixels", 2**31, "pixels: expected 1 .. 2"),
        ("channels", 0, "channels: expected 1 .. 2"),
        ("batch", 2**31 - 1, None),
        ("threads", 0, "threads: expected 1 .. 4096, got 0"),
        ("threads", 5000, "threads: expected 1 .. 4096, got 5000"),
        ("temperature", 0.0, "temperature: expected a finite number above 0"),
        ("temperature", -1.0, "temperature: expected a finite number above 0"),
        ("temperature", float("nan"), "temperature: expected a finite number above 0"),
        ("temperature", float("inf"), "temperature: expected a finite number above 0"),
        ("features_strides", (15, -3, 1), "features_strides: expected strides of at least 0, got -3"),
        ("dtype", 4, "dtype: expected 0 .float32.*got 4"),
        ("features_ptr", 0, "features_ptr: expected the address of a tensor"),
        ("inside_ptr", 0, "inside_ptr: expected the address of a tensor"),
        ("statistics_ptr", 0, "statistics_ptr: expected the address of a tensor"),
    ],
)
def test_bad_arguments(name, value, message):
    changes = {name: value}
    if message is None:  # sizes that pass one by one, but not together
        changes.update(pixels=2**31 - 1, channels=2**31 - 1)
        message = "batch: expected features to be addressable"
    call = Call()
    for run in (call.forward, call.backward):
        with pytest.raises(ValueError, match=message):
            run(**changes)
    assert call.loss.isnan().all() and call.grad.isnan().all()


def test_bad_addresses_of_results():
    call = Call()
    with pytest.raises(ValueError, match="loss_ptr: expected the address"):
        call.forward(loss_ptr=0)
    with pytest.raises(ValueError, match="grad_loss_ptr: expected the address"):
        call.backward(grad_loss_ptr=0)
    with pytest.raises(ValueError, match="grad_features_ptr: expected the address"):
        call.backward(grad_features_ptr=0)
    with pytest.raises(ValueError, match="features_ptr: expected an address aligned"):
        call.forward(features_ptr=call.features.data_ptr() + 2)
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
    call.forward(batch=0, features_ptr=0, inside_ptr=0, loss_ptr=0, statistics_ptr=0)
    call.backward(batch=0, features_ptr=0, inside_ptr=0, statistics_ptr=0, grad_loss_ptr=0, grad_features_ptr=0)
    assert call.loss.isnan().all() and call.grad.isnan().all()


def test_low_precision_needs_only_its_own_alignment():
    aligned, shifted = Call(torch.bfloat16), Call(torch.bfloat16)
    storage = torch.empty(shifted.features.numel() + 1, dtype=torch.bfloat16)
    storage[1:] = shifted.features.flatten()
    aligned.forward()
    shifted.forward(features_ptr=storage.data_ptr() + 2)
    assert torch.equal(aligned.loss, shifted.loss)
