"""pixel_contrastive_loss against loops over pixels, its limits, and its banded form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_fast import ops
from magnet_fast.ops import _pixel_contrastive_loss as implementation

from . import loops
from .cases import contrastive_case, weighted_sum


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), pixels=st.integers(1, 7), channels=st.integers(1, 4), temperature=st.floats(0.05, 2.0)
)
def test_equals_loops(seed, pixels, channels, temperature):
    torch.manual_seed(seed)
    features = torch.randn(2, pixels, channels, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, pixels) < 0.5
    ours = ops.pixel_contrastive_loss(features, mask, temperature=temperature)
    theirs = loops.pixel_contrastive_loss(features, mask, temperature)
    torch.testing.assert_close(ours, theirs)
    assert (ours >= -1e-12).all()
    torch.testing.assert_close(
        torch.autograd.grad(weighted_sum((ours,)), features), torch.autograd.grad(weighted_sum((theirs,)), features)
    )


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_full_and_empty_masks_give_zero(inside, dtype):
    features = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    mask = torch.full((2, 4, 5), inside)
    mask[1, 1, 2:] ^= True
    loss = ops.pixel_contrastive_loss(features, mask)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    assert loss[0] == 0 and not grad[0].any()
    assert loss[1] > 0 and grad[1].any() and grad.isfinite().all()


def test_maps_and_sequences_agree():
    features, mask = torch.randn(2, 6, 3, 4), torch.rand(2, 3, 4) < 0.4
    loss = ops.pixel_contrastive_loss(features, mask)
    assert loss.shape == (2,) and loss.dtype == torch.float32
    flat = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(ops.pixel_contrastive_loss(flat, mask.flatten(1)), loss, rtol=0, atol=0)
    torch.testing.assert_close(ops.pixel_contrastive_loss(features, 255 * mask.to(torch.uint8)), loss, rtol=0, atol=0)
    unit = torch.nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(ops.pixel_contrastive_loss(unit, mask, normalize=False), loss)
    torch.testing.assert_close(ops.pixel_contrastive_loss(3 * features, mask), loss)


@pytest.fixture
def reference():
    """For what is about the reference's own ways."""
    with ops.backend("reference"):
        yield


@pytest.mark.usefixtures("reference")
def test_bands_equal_the_whole(monkeypatch):
    case = contrastive_case()
    loss, grads = case(), case.gradients()
    for chunk in (1, 3 * 6 * 2, 3 * 6 * 4):  # bands of 1, 2 and 4 rows of 6
        monkeypatch.setattr(implementation, "_CHUNK", chunk)
        torch.testing.assert_close(case(), loss)
        torch.testing.assert_close(case.gradients(), grads)
        compiled = torch.compile(lambda features: case(features), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(case.gradients(compiled), grads)
        torch.compiler.reset()


@pytest.mark.usefixtures("reference")
def test_memory_is_linear_in_the_pixels(monkeypatch):
    """Between the passes nothing of the size P * P is kept."""
    monkeypatch.setattr(implementation, "_CHUNK", 400)
    features, mask = torch.randn(1, 400, 4, requires_grad=True), torch.rand(1, 400) < 0.5
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = ops.pixel_contrastive_loss(features, mask)
    loss.sum().backward()
    assert kept and max(kept) <= 400 * 4


def test_low_temperature_and_zero_features():
    features = torch.randn(1, 9, 4)
    features[0, 3] = 0
    features.requires_grad_()
    mask = torch.arange(9)[None] < 4
    loss = ops.pixel_contrastive_loss(features, mask, temperature=1e-3)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    assert loss.isfinite().all() and grad.isfinite().all()


def test_low_precision_features_are_computed_in_float32():
    features, mask = torch.randn(2, 30, 8).bfloat16(), torch.rand(2, 30) < 0.5
    exact = ops.pixel_contrastive_loss(features.float(), mask)
    torch.testing.assert_close(ops.pixel_contrastive_loss(features, mask), exact, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.pixel_contrastive_loss(features.float(), mask), exact, rtol=0, atol=0)


FEATURES, MASK = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "features: expected a tensor", {"features": [0.0]}),
        (TypeError, "features: expected float32.* got int64", {"features": FEATURES.long()}),
        (ValueError, r"features: expected 3 dimensions \(B, C, H, W\) or \(B, P, C\)", {"features": FEATURES[0, 0]}),
        (ValueError, "features: every dimension", {"features": FEATURES[:0]}),
        (TypeError, "mask: expected a tensor", {"mask": None}),
        (TypeError, "mask: expected bool or an integer type.* got float32", {"mask": MASK.float()}),
        (ValueError, r"mask: expected shape \(2, 4, 5\)", {"mask": MASK[:, :3]}),
        (ValueError, "mask: expected the device of features", {"mask": MASK.to("meta")}),
        (ValueError, "temperature: expected a finite number above 0, got 0", {"temperature": 0.0}),
        (TypeError, "temperature: expected a number, got NoneType", {"temperature": None}),
        (TypeError, "normalize: expected a bool", {"normalize": 1}),
    ],
)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.pixel_contrastive_loss(**{"features": FEATURES, "mask": MASK, **change})


def test_a_sparse_mask_is_refused():
    with pytest.raises(TypeError, match="mask: expected a dense tensor"):
        ops.pixel_contrastive_loss(torch.ones(1, 4, 2), torch.eye(4)[:1].bool().to_sparse())
