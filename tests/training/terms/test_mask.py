"""BCE and Dice against a slow float64 version, pixel by pixel, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.terms import MaskTerm
from magnet_fast.training.terms.mask import MaskConfig, mask_at, mask_loss


def slow_mask_losses(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """BCE and Dice of (B, h, w) logits against (B, h, w), in float64 and plain Python sums."""
    bce, dice = 0.0, 0.0
    for sample, truth in zip(logits.double(), target.double(), strict=True):
        p, t = sample.sigmoid().flatten().tolist(), truth.flatten().tolist()
        bce += sum(-b * math.log(a) - (1 - b) * math.log1p(-a) for a, b in zip(p, t, strict=True)) / len(p)
        dice += 1 - (2 * sum(a * b for a, b in zip(p, t, strict=True)) + 1) / (sum(p) + sum(t) + 1)
    return bce / len(logits), dice / len(logits)


def slow_loss(prediction: Prediction, mask: torch.Tensor, bce: float, dice: float) -> float:
    final = prediction.mask.double()
    if final.shape[-2:] != mask.shape[-2:]:
        final = F.interpolate(final[:, None], size=mask.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
    pairs = [(final, mask)]
    pairs += [(each.mask, mask_at(mask.double(), each.mask.shape[-2:])) for each in prediction.earlier]
    parts = [slow_mask_losses(logits, target) for logits, target in pairs]
    return sum(bce * first + dice * second for first, second in parts)


def made(batch: int = 3, sizes: tuple[int, ...] = (8, 8, 8, 8, 8)) -> Prediction:
    final, *earlier = (Prediction(3 * torch.randn(batch, size, size)) for size in sizes)
    return final._replace(earlier=tuple(earlier))


def total(prediction: Prediction, mask: torch.Tensor, **factors: float) -> torch.Tensor:
    return MaskTerm(MaskConfig(**factors))(prediction, {"mask": mask}, None)[0]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("factors", [(2.0, 2.0), (0.5, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize("side", [(32, 32), (30, 34), (8, 8)])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8,), (8, 4, 8, 6)])
def test_loss_equals_slow_version(factors: tuple, side: tuple[int, int], sizes: tuple[int, ...]) -> None:
    prediction = made(sizes=sizes)
    mask = (torch.rand(3, *side) > 0.7).to(torch.uint8)
    mask[1] = 0
    loss = total(prediction, mask, bce=factors[0], dice=factors[1])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(prediction, mask, *factors), rel=1e-5)


def test_the_difference_of_a_pair_has_the_pairs_cross_entropy() -> None:
    pair, mask = 2 * torch.randn(2, 2, 12, 10), torch.rand(2, 12, 10) > 0.5
    bce, _ = mask_loss(Prediction(pair[:, 1] - pair[:, 0]), mask)
    assert bce.item() == pytest.approx(F.cross_entropy(pair, mask.long()).item(), rel=1e-5)


def test_reported_parts_are_means_over_predictions() -> None:
    mask = torch.rand(3, 32, 32) > 0.6
    prediction = made(sizes=(8, 8, 8, 8))
    prediction.mask.requires_grad_()
    loss, values = MaskTerm(MaskConfig())(prediction, {"mask": mask}, None)
    assert loss.item() == pytest.approx(4 * (2 * values["bce"] + 2 * values["dice"]).item(), rel=1e-6)
    assert loss.requires_grad and not any(value.requires_grad for value in values.values())


def test_earlier_predictions_count_as_said() -> None:
    prediction, mask = made(sizes=(8, 4, 8)), (torch.rand(3, 16, 16) > 0.7).to(torch.uint8)
    first, last = total(prediction, mask, earlier=0), total(prediction._replace(earlier=()), mask)
    torch.testing.assert_close(first, last)
    whole = total(prediction, mask)
    torch.testing.assert_close(total(prediction, mask, earlier=0.4), last + 0.4 * (whole - last))


@pytest.mark.parametrize("present", [0, 1])
def test_perfect_predictions_cost_nothing(present: int) -> None:
    mask = torch.full((2, 16, 16), present)
    right = Prediction(torch.full((2, 4, 4), 40.0 if present else -40.0))
    wrong = Prediction(-right.mask)
    assert total(right._replace(earlier=(right,)), mask).item() == pytest.approx(0, abs=1e-6)
    found = total(wrong._replace(earlier=(wrong,)), mask).item()
    assert found > 100 and math.isfinite(found)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite_with_gradients(extreme: float) -> None:
    logits = torch.full((1, 4, 4), extreme, requires_grad=True)
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    loss = total(Prediction(logits), mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_float32_under_autocast() -> None:
    prediction = made()
    mask = torch.rand(3, 64, 64) > 0.5
    expected = total(prediction, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = total(prediction, mask)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


def test_halved_batches_average_to_the_whole() -> None:
    prediction = made(batch=4)
    mask = torch.rand(4, 32, 32) > 0.5
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        earlier = tuple(Prediction(each.mask[part]) for each in prediction.earlier)
        halves.append(total(Prediction(prediction.mask[part], earlier=earlier), mask[part]))
    assert sum(halves).item() / 2 == pytest.approx(total(prediction, mask).item(), rel=1e-6)


def test_mask_at_puts_targets_where_the_resize_shows_them() -> None:
    # A vertical edge at column 20 of 65: logits live on columns 0, 4, ..., 64.
    mask = torch.zeros(1, 65, 65)
    mask[:, :, 20:] = 1
    target = mask_at(mask, (17, 17))
    assert target[0, 0, :5].eq(0).all()
    assert target[0, 0, 5].item() == pytest.approx(2 / 3)  # pixels 19, 20, 21 around column 20
    assert target[0, 0, 6:].eq(1).all()
    assert torch.equal(mask_at(mask, (65, 65)), mask)
    ones = torch.ones(1, 30, 33)
    assert mask_at(ones, (8, 9)).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        ((2, 4, 4), (2, 1, 16, 16), r"mask: expected shape \(B, H, W\)"),
        ((2, 3, 4, 4), (2, 16, 16), r"prediction.mask: expected shape"),
        ((2, 4, 4), (3, 16, 16), "3 masks for 2 predictions"),
    ],
)
def test_mismatched_shapes_are_named(logits: tuple, mask: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        total(Prediction(torch.zeros(logits)), torch.zeros(mask))
