"""The Triton pixel contrastive loss, in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from magnet_fast.kernels import pixel_contrastive_loss as kernels

from magnet_fast import ops

from ..ops.cases import Case, contrastive_case
from .agreement import LOW, assert_agree, assert_registered, assert_same_bits_twice, run


def random_case(
    *, batch=1, pixels=20, channels=8, share=0.4, temperature=0.1, normalize=True, dtype=torch.float32
) -> Case:
    generator = torch.Generator().manual_seed(pixels + channels)
    features = torch.randn(batch, pixels, channels, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, pixels, generator=generator) < share
    return Case(
        "pixel_contrastive_loss",
        [features.to(dtype).requires_grad_()],
        lambda features: ((features, mask), {"temperature": temperature, "normalize": normalize}),
    )


@pytest.fixture
def in_blocks(monkeypatch):
    """No tile holds all channels of a pixel: the way of features with many of them."""
    monkeypatch.setattr(kernels, "_WHOLE_BYTES", {2: 0, 4: 0})
    monkeypatch.setattr(kernels, "_GRADIENT_CHANNELS", 32)


@pytest.mark.parametrize(
    "shape",
    [
        {"pixels": 1},
        {"pixels": 3, "channels": 2},
        {"pixels": 37, "channels": 24, "batch": 3},
        {"pixels": 130, "channels": 20},
        {"pixels": 33, "temperature": 0.01},
        {"pixels": 33, "temperature": 5.0, "normalize": False},
    ],
)
def test_equals_the_reference(shape):
    assert_agree(random_case(**shape))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_many_channels(dtype, in_blocks):
    assert_agree(random_case(pixels=70, channels=150, dtype=dtype))
    assert_agree(random_case(pixels=9, channels=65, normalize=False, temperature=9.0, dtype=dtype))


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision(dtype):
    results = assert_agree(random_case(pixels=70, channels=32, dtype=dtype))
    assert results[0].dtype == torch.float32 and results[1].dtype == dtype


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_empty_or_full_mask_has_no_loss(share):
    for result in run(random_case(share=share), "triton"):
        assert not result.any()


def test_one_pixel_on_a_side():
    case = random_case(pixels=40)
    mask = case.arguments(*case.leaves)[0][1]
    mask.zero_()
    mask[0, 17] = True
    assert_agree(case)


def test_pixels_without_features():
    """A pixel of zeros, and one below the least norm, as in the reference."""
    case = random_case()
    case.leaves[0].data[0, 3] = 0
    case.leaves[0].data[0, 4] = 1e-8
    assert_agree(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_undefined_numbers_do_not_vanish(value):
    case = random_case(batch=2)
    case.leaves[0].data[0, 3, 2] = value
    loss, grad = run(case, "triton")
    assert loss[0].isnan() and grad[0].isnan().all()
    assert loss[1].isfinite() and grad[1].isfinite().all()


def test_strong_similarities_without_normalisation():
    case = random_case(pixels=40, normalize=False, temperature=0.01)
    results = run(case, "triton")
    assert all(result.isfinite().all() for result in results)
    assert_agree(case)


def test_views():
    case = random_case(batch=2, pixels=21, channels=6)
    features = case.leaves[0].detach()
    views = {
        "channels first": features.transpose(1, 2).contiguous().transpose(1, 2),
        "every other channel": features.repeat_interleave(2, 2)[..., ::2],
        "one image repeated": features[:1].expand_as(features),
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        results = []
        for leaf in (view, view.contiguous()):
            results.append(run(Case(case.operator, [leaf.requires_grad_()], case.arguments), "triton"))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs), name


def test_a_map_of_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 3, 5, generator=generator).requires_grad_()
    mask = torch.rand(2, 3, 5, generator=generator) < 0.5
    case = Case("pixel_contrastive_loss", [features], lambda features: ((features, mask.long()), {}))
    for ours, theirs in zip(run(case, "triton"), run(case, "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_same_bits_twice_and_whatever_the_batch():
    case = random_case(batch=2, pixels=50)
    assert_same_bits_twice(case)
    mask = case.arguments(*case.leaves)[0][1]
    alone = Case(case.operator, [case.leaves[0].detach()[:1].requires_grad_()], lambda f: ((f, mask[:1]), {}))
    both = Case(case.operator, case.leaves, lambda f: ((f, mask), {}))
    with ops.backend("triton"):
        assert torch.equal(alone()[0], both()[0][:1])


def test_registration():
    assert_registered(contrastive_case(dtype=torch.float32))
