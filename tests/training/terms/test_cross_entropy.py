"""LAVT's published loss against PyTorch's own weighted cross-entropy on the pair of logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.terms import CrossEntropyTerm
from magnet_fast.training.terms.cross_entropy import CrossEntropyConfig


@pytest.mark.parametrize("side", [(12, 10), (30, 33)])
@pytest.mark.parametrize("weights", [(0.9, 1.1), (0.3, 2.0)])
def test_equals_torchs_on_the_pair(side: tuple[int, int], weights: tuple[float, float]) -> None:
    torch.manual_seed(0)
    pair = (3 * torch.randn(2, 2, 12, 10)).requires_grad_()
    mask = (torch.rand(2, *side) > 0.7).to(torch.uint8)
    term = CrossEntropyTerm(CrossEntropyConfig(background=weights[0], target=weights[1]))
    loss, values = term(Prediction(pair[:, 1] - pair[:, 0]), {"mask": mask}, None)
    resized = F.interpolate(pair, size=side, mode="bilinear", align_corners=True)
    expected = F.cross_entropy(resized, mask.long(), weight=torch.tensor(weights))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, pair, retain_graph=True)[0] for value in (loss, expected)))
    assert values.keys() == {"cross_entropy"} and not values["cross_entropy"].requires_grad


def test_the_published_weights_are_the_defaults() -> None:
    assert (CrossEntropyConfig().background, CrossEntropyConfig().target) == (0.9, 1.1)


def test_earlier_predictions_do_not_count_and_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 8, 8), torch.rand(2, 32, 32) > 0.5
    term = CrossEntropyTerm(CrossEntropyConfig())
    expected = term(Prediction(logits), {"mask": mask}, None)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = term(Prediction(logits, earlier=(Prediction(-logits),)), {"mask": mask}, None)[0]
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_mismatched_shapes_are_named() -> None:
    term = CrossEntropyTerm(CrossEntropyConfig())
    with pytest.raises(ValueError, match="3 masks for 2 predictions"):
        term(Prediction(torch.zeros(2, 4, 4)), {"mask": torch.zeros(3, 4, 4)}, None)
