"""The segmentation loss against a slow float64 version, pixel by pixel, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from magnet_fast import models
from magnet_fast.losses import LossWeights, alignment_loss, grounding_loss, mask_at, segmentation_loss
from magnet_fast.models import SegmentationOutput


def slow_mask_losses(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """BCE and Dice of (B, K, h, w) logits against (B, h, w), in float64 and plain Python sums."""
    bce, dice = 0.0, 0.0
    for sample, truth in zip(logits.double(), target.double(), strict=True):
        probability = sample[0].sigmoid() if len(sample) == 1 else sample.softmax(dim=0)[1]
        p, t = probability.flatten().tolist(), truth.flatten().tolist()
        bce += sum(-b * math.log(a) - (1 - b) * math.log1p(-a) for a, b in zip(p, t, strict=True)) / len(p)
        dice += 1 - (2 * sum(a * b for a, b in zip(p, t, strict=True)) + 1) / (sum(p) + sum(t) + 1)
    return bce / len(logits), dice / len(logits)


def slow_loss(output: SegmentationOutput, mask: torch.Tensor, weights: LossWeights) -> float:
    final = output.mask_logits.double()
    if final.shape[-2:] != mask.shape[-2:]:
        final = F.interpolate(final, size=mask.shape[-2:], mode="bilinear", align_corners=True)
    pairs = [(final, mask)]
    pairs += [(logits, mask_at(mask.double(), logits.shape[-2:])) for logits, _ in output.auxiliary]
    total = 0.0
    for logits, target in pairs:
        bce, dice = slow_mask_losses(logits, target)
        total += weights.bce * bce + weights.dice * dice
    for logits in [output.class_logits, *(entry for _, entry in output.auxiliary)]:
        if logits is not None:
            for row, truth in zip(logits[:, 0].double(), mask, strict=True):
                total -= weights.classification * row.log_softmax(0)[int(truth.any())].item() / len(mask)
    return total


def magnet_output(batch: int = 3, size: int = 8, auxiliary: int = 4) -> SegmentationOutput:
    def prediction() -> tuple[torch.Tensor, torch.Tensor]:
        return 3 * torch.randn(batch, 1, size, size), torch.randn(batch, 1, 2)

    return SegmentationOutput(*prediction(), [prediction() for _ in range(auxiliary)])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0.5, 3.0, 0.25), LossWeights(0.0, 0.0, 1.0)])
@pytest.mark.parametrize("side", [(32, 32), (30, 34), (8, 8)])
def test_magnet_loss_equals_slow_version(weights: LossWeights, side: tuple[int, int]) -> None:
    output = magnet_output()
    mask = (torch.rand(3, *side) > 0.7).to(torch.uint8)
    mask[1] = 0
    losses = segmentation_loss(output, mask, weights)
    assert losses["total"].dtype == torch.float32
    assert losses["total"].item() == pytest.approx(slow_loss(output, mask, weights), rel=1e-5)


def test_lavt_loss_equals_slow_version() -> None:
    output = SegmentationOutput(2 * torch.randn(2, 2, 12, 10), None)
    mask = torch.rand(2, 12, 10) > 0.5
    losses = segmentation_loss(output, mask)
    assert losses["total"].item() == pytest.approx(slow_loss(output, mask, LossWeights()), rel=1e-5)
    # Two logits and a softmax: the same as torch's own cross-entropy.
    assert losses["bce"].item() == pytest.approx(F.cross_entropy(output.mask_logits, mask.long()).item(), rel=1e-5)
    assert losses["class"].item() == 0


def test_reported_parts_are_means_over_predictions() -> None:
    output = magnet_output(auxiliary=3)
    mask = torch.rand(3, 32, 32) > 0.6
    losses = segmentation_loss(output, mask)
    parts = 2 * losses["bce"] + 2 * losses["dice"] + losses["class"]
    assert losses["total"].item() == pytest.approx(4 * parts.item(), rel=1e-6)
    assert not any(losses[name].requires_grad for name in ("bce", "dice", "class"))


@pytest.mark.parametrize("present", [0, 1])
def test_perfect_predictions_cost_nothing(present: int) -> None:
    mask = torch.full((2, 16, 16), present)
    logits = torch.full((2, 1, 4, 4), 40.0 if present else -40.0)
    classes = 40.0 * F.one_hot(torch.tensor([[present]] * 2), 2).float()
    losses = segmentation_loss(SegmentationOutput(logits, classes, [(logits, classes)]), mask)
    assert losses["total"].item() == pytest.approx(0, abs=1e-6)
    wrong = segmentation_loss(SegmentationOutput(-logits, -classes, [(-logits, -classes)]), mask)
    assert wrong["total"].item() > 100
    assert math.isfinite(wrong["total"].item())


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite_with_gradients(extreme: float) -> None:
    logits = torch.full((1, 1, 4, 4), extreme, requires_grad=True)
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    total = segmentation_loss(SegmentationOutput(logits, torch.zeros(1, 1, 2)), mask)["total"]
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_float32_under_autocast() -> None:
    output = magnet_output()
    mask = torch.rand(3, 64, 64) > 0.5
    expected = segmentation_loss(output, mask)["total"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segmentation_loss(output, mask)["total"]
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


def test_halved_batches_average_to_the_whole() -> None:
    output = magnet_output(batch=4)
    mask = torch.rand(4, 32, 32) > 0.5
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        auxiliary = [(logits[part], classes[part]) for logits, classes in output.auxiliary]
        piece = SegmentationOutput(output.mask_logits[part], output.class_logits[part], auxiliary)
        halves.append(segmentation_loss(piece, mask[part])["total"])
    assert sum(halves).item() / 2 == pytest.approx(segmentation_loss(output, mask)["total"].item(), rel=1e-6)


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
        ((2, 1, 4, 4), (2, 1, 16, 16), r"mask: expected shape \(B, H, W\)"),
        ((2, 3, 4, 4), (2, 16, 16), r"mask_logits: expected shape"),
        ((2, 1, 4, 4), (3, 16, 16), "3 masks for 2 predictions"),
    ],
)
def test_mismatched_shapes_are_named(logits: tuple, mask: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_loss(SegmentationOutput(torch.zeros(logits), None), torch.zeros(mask))


def test_gradients_reach_the_real_models_parameters() -> None:
    """Every parameter that the mask depends on learns from the first or second step; closed gates open first."""
    small = {"text__vocab_size": 64, "decoder": {"width": 32, "num_heads": 2, "points": 2, "pixel_layers": 1,
             "pixel_feedforward": 32, "mask_layers": 3, "mask_feedforward": 32}}  # fmt: skip
    model = models.build("magnet_tiny", **small)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image, ids = torch.randn(2, 3, 64, 64), torch.randint(5, 64, (2, 8))
    mask = torch.zeros(2, 64, 64)
    mask[:, 10:40, 20:50] = 1
    reached: set[str] = set()
    for _ in range(3):
        optimiser.zero_grad()
        segmentation_loss(model(image, ids, torch.ones_like(ids)), mask)["total"].backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    # The last stage's exchange leads nowhere: neither image nor text goes on after it; the projection of the text
    # belongs to another loss.
    names = {name for name, _ in model.named_parameters()}
    expected = {"image_encoder", "text_encoder", "alignment", "pixel_decoder", "mask_decoder"}
    for part in expected:
        own = {name for name in names if name.startswith(part)}
        assert len(own & reached) >= 0.75 * len(own), sorted(own - reached)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    assert any(f"{name}.weight" in reached for name in embeddings)


def slow_alignment(features: torch.Tensor, sentence: torch.Tensor, inside: torch.Tensor, taus: tuple) -> list[float]:
    """P2P and P2T of one image: features (C, P), sentence (C,), inside (P,), sums written out in float64."""
    z = F.normalize(features.double().T, dim=1)
    t = F.normalize(sentence.double(), dim=0)
    sides = [inside.nonzero()[:, 0].tolist(), (~inside).nonzero()[:, 0].tolist()]
    p2p = p2t = 0.0
    for own, other in (sides, sides[::-1]):
        for i in own:
            same = sum(math.exp(z[i] @ z[j] / taus[0]) for j in own)
            rest = sum(math.exp(z[i] @ z[k] / taus[0]) for k in other)
            p2p -= math.log(same / (same + rest)) / len(own)
    for i in sides[0]:
        rest = sum(math.exp(z[k] @ t / taus[1]) for k in sides[1])
        mine = math.exp(z[i] @ t / taus[1])
        p2t -= math.log(mine / (mine + rest)) / len(sides[0])
    return [p2p, p2t]


@pytest.mark.parametrize("taus", [(0.1, 0.1), (0.5, 0.07)])
def test_alignment_equals_slow_version(taus: tuple[float, float]) -> None:
    features, sentence = torch.randn(3, 6, 4, 5), torch.randn(3, 6)
    mask = (torch.rand(3, 4, 5) > 0.6).float()
    found = alignment_loss(features, sentence, mask, pixel_temperature=taus[0], text_temperature=taus[1])
    images = zip(features.flatten(2), sentence, mask.flatten(1) > 0, strict=True)
    slow = [slow_alignment(*image, taus) for image in images]
    expected = torch.tensor(slow).mean(dim=0)
    assert found["p2p"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found["p2t"].item() == pytest.approx(expected[1].item(), rel=1e-5)


def test_alignment_brings_the_mask_to_the_features() -> None:
    features, sentence = torch.randn(1, 6, 8, 8), torch.randn(1, 6)
    small = torch.zeros(1, 8, 8)
    small[:, 2:5, 3:7] = 1
    large = F.interpolate(small[None], size=(29, 29), mode="nearest")[0]
    coarse = (mask_at(large, (8, 8)) >= 0.5).float()
    one, other = (alignment_loss(features, sentence, mask) for mask in (large, coarse))
    assert one["p2p"] == other["p2p"] and one["p2t"] == other["p2t"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_alignment_of_an_empty_or_full_mask_is_zero_with_zero_gradients(value: float) -> None:
    features = torch.randn(2, 6, 4, 4, requires_grad=True)
    sentence = torch.randn(2, 6, requires_grad=True)
    parts = alignment_loss(features, sentence, torch.full((2, 16, 16), value))
    assert parts["p2p"] == 0 and parts["p2t"] == 0
    (parts["p2p"] + parts["p2t"]).backward()
    assert not features.grad.any() and not sentence.grad.any()


def test_alignment_gradients() -> None:
    features, sentence = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 3, 3), (2, 5)))
    mask = torch.zeros(2, 3, 3)
    mask[:, 1, :2] = 1

    def total(features: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
        parts = alignment_loss(features, sentence, mask, pixel_temperature=0.7, text_temperature=0.7)
        return parts["p2p"] + parts["p2t"]

    total(features, sentence).backward()
    step = 1e-2  # the loss computes in float32
    for tensor in (features, sentence):
        for place in range(0, tensor.numel(), 7):
            shift = torch.zeros(tensor.numel())
            shift[place] = step
            shift = shift.view(tensor.shape)
            moved = [total(*(t + sign * shift if t is tensor else t for t in (features, sentence))) for sign in (1, -1)]
            slope = (moved[0] - moved[1]).item() / (2 * step)
            assert tensor.grad.flatten()[place].item() == pytest.approx(slope, abs=2e-3)


def test_alignment_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"sentence: expected batch and channels.*got \(2, 5\)"):
        alignment_loss(torch.randn(2, 6, 4, 4), torch.randn(2, 5), torch.ones(2, 4, 4))


def test_grounding_loss() -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    targets = logits.detach().argmax(dim=-1)
    targets[0, 1] = (targets[0, 1] + 1) % 11
    valid = torch.tensor([[True, True, False], [True, False, False]])
    loss, accuracy = grounding_loss(logits, targets, valid)
    rows = [(0, 0), (0, 1), (1, 0)]
    expected = -sum(logits.detach().double().log_softmax(-1)[b, k, targets[b, k]].item() for b, k in rows) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5) and accuracy.item() == pytest.approx(2 / 3)
    loss.backward()
    assert not logits.grad[~valid].any() and logits.grad[valid].any(dim=-1).all()
    nothing, accuracy = grounding_loss(logits, targets, torch.zeros_like(valid))
    assert nothing == 0 and accuracy == 0
