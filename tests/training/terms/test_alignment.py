"""The alignment loss against a slow float64 version, and the term that owns its projection."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from magnet_fast.models import Prediction, Words
from magnet_fast.training.terms import TERMS, AlignmentTerm
from magnet_fast.training.terms.alignment import AlignmentConfig, alignment_loss
from magnet_fast.training.terms.mask import mask_at

from ..fakes import FakeModel


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_the_term_projects_the_sentence_and_says_both_parts() -> None:
    term = AlignmentTerm.build(AlignmentConfig(pixel_temperature=0.3, text_temperature=0.2), FakeModel(width=6), None)
    assert term.projection.weight.shape == (6, 6)
    word_mask = torch.tensor([[True, True, False], [True, False, False]])
    words = Words(torch.randn(2, 3, 6), word_mask)
    pixels, mask = torch.randn(2, 6, 4, 4), (torch.rand(2, 16, 16) > 0.5).float()
    loss, values = term(Prediction(torch.zeros(2, 4, 4), pixels=pixels, words=words), {"mask": mask}, None)
    mean = torch.stack([words.features[0, :2].mean(0), words.features[1, 0]])
    expected = alignment_loss(pixels, term.projection(mean), mask, pixel_temperature=0.3, text_temperature=0.2)
    torch.testing.assert_close(loss, expected["p2p"] + expected["p2t"])
    assert set(values) == set(TERMS["alignment"].logged) and not any(v.requires_grad for v in values.values())


def test_a_model_without_pixels_is_refused_by_name() -> None:
    model = FakeModel()
    model.head.pixel_channels = None
    with pytest.raises(ValueError, match=r"terms\.alignment: .*pixel_channels.*terms\.alignment\.weight to 0"):
        AlignmentTerm.build(AlignmentConfig(), model, None)
