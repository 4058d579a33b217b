"""The category of what the mask picks out of the pixels, by loops in float64; samples without one, and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.objective import tensors_of
from magnet_fast.training.terms.category import CategoryConfig, CategoryTerm

from ..fakes import FakeModel


def made(categories: list[int | None], size: tuple[int, int] = (4, 6)) -> tuple[CategoryTerm, Prediction, dict]:
    torch.manual_seed(0)
    count = len(categories)
    pixels = torch.randn(count, 5, *size, requires_grad=True)
    mask = torch.randn(count, 4, 6, requires_grad=True)
    return CategoryTerm(CategoryConfig(classes=7), 5), Prediction(mask, pixels=pixels), {"category": categories}


@pytest.mark.parametrize("size", [(4, 6), (3, 3)])
def test_equals_the_sums_over_known_samples(size: tuple[int, int]) -> None:
    term, prediction, batch = made([3, None, 7, 1], size)
    loss, values = term(prediction, tensors_of(batch), None)
    logits = F.interpolate(prediction.mask[:, None].double(), size=size, mode="bilinear", align_corners=True)[:, 0]
    weight, bias = term.classify.weight.double(), term.classify.bias.double()
    entropies = []
    for b, category in enumerate(batch["category"]):
        if category is None:
            continue
        total, mean = 0.0, torch.zeros(5, dtype=torch.float64)
        for i in range(size[0]):
            for j in range(size[1]):
                y = 1 / (1 + (-logits[b, i, j]).exp())
                total, mean = total + y, mean + y * prediction.pixels[b, :, i, j].double()
        entropies.append(-(weight @ (mean / total) + bias).log_softmax(0)[category - 1])
    torch.testing.assert_close(loss.double(), torch.stack(entropies).mean(), rtol=1e-5, atol=1e-6)
    assert values["category"] == loss
    loss.backward()
    moved = [bool(gradient.any()) for gradient in prediction.pixels.grad]
    assert moved == [True, False, True, True] and prediction.mask.grad[0].any()


def test_without_known_categories_everything_gets_a_gradient_of_zero() -> None:
    """Processes that train together wait for each of them."""
    term, prediction, batch = made([None, None])
    loss, _ = term(prediction, tensors_of(batch), None)
    assert loss == 0
    loss.backward()
    gradients = [prediction.pixels.grad, prediction.mask.grad, *(p.grad for p in term.parameters())]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_an_empty_mask_is_no_division_by_zero() -> None:
    term, prediction, batch = made([2])
    prediction = prediction._replace(mask=torch.full((1, 4, 6), -1e4, requires_grad=True))
    term(prediction, tensors_of(batch), None)[0].backward()
    assert prediction.mask.grad.isfinite().all() and prediction.pixels.grad.isfinite().all()


def test_models_and_data_without_what_it_reads_are_refused() -> None:
    model = FakeModel()
    term = CategoryTerm.build(CategoryConfig(classes=7), model, None)
    term.check(SimpleNamespace(categories={1, 7}))
    for categories, wrong in (({0, 2}, 0), ({3, 9}, 9)):
        with pytest.raises(ValueError, match=rf"terms\.category\.classes: expected .* 1 to 7, got {wrong}"):
            term.check(SimpleNamespace(categories=categories))
    with pytest.raises(ValueError, match=r"terms\.category: the data do not say of which category"):
        term.check(SimpleNamespace(categories=frozenset()))
    model.head.pixel_channels = None
    with pytest.raises(ValueError, match=r"terms\.category: .*pixel_channels.*terms\.category\.weight to 0"):
        CategoryTerm.build(CategoryConfig(), model, None)
