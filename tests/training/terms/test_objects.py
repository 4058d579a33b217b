"""The loss of classes and boxes against sums over cells, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.terms.objects import ObjectsConfig, ObjectsTerm

from ..fakes import FakeModel

NOTHING = Prediction(torch.zeros(4, 8, 8))


def made() -> tuple[ObjectsTerm, dict]:
    """Two images of two sentences each."""
    torch.manual_seed(0)
    term = ObjectsTerm(ObjectsConfig(classes=3, smoothing=0), 5)
    classes = torch.randint(0, 4, (2, 3, 3)).repeat_interleave(2, dim=0)
    boxes = torch.rand(2, 4, 3, 3)
    boxes[:, :, 0] = 0
    batch = {
        "image": torch.zeros(4, 3, 24, 24),
        "extra": {"classes": classes, "boxes": boxes.repeat_interleave(2, dim=0)},
        "looked": [None, torch.randn(2, 5, 3, 3, requires_grad=True), None, torch.rand(2, 4, 3, 3, requires_grad=True)],
    }
    return term, batch


def test_is_the_mean_over_the_cells_of_each_image_once() -> None:
    term, batch = made()
    loss, values = term(NOTHING, batch, None)
    _, middle, _, said = batch["looked"]
    classes, boxes = batch["extra"]["classes"][::2], batch["extra"]["boxes"][::2]
    each = F.cross_entropy(term.classify(middle), classes, reduction="none")
    weight = torch.where(classes == 0, term.unknown, 1.0)
    expected = (weight * each).sum() / weight.sum()
    off = [(said[i, :, y, x] - boxes[i, :, y, x]).abs().sum() for i in (0, 1) for y in (1, 2) for x in range(3)]
    torch.testing.assert_close(values["classes"], expected.detach())
    torch.testing.assert_close(values["boxes"], torch.stack(off).mean().detach())
    torch.testing.assert_close(loss, expected + 2 * torch.stack(off).mean())
    loss.backward()
    assert said.grad[:, :, 0].abs().max() == 0 and said.grad[:, :, 1:].abs().max() > 0 and middle.grad.abs().max() > 0


def test_a_photograph_without_things_has_no_box_to_learn() -> None:
    term, batch = made()
    batch["extra"]["boxes"] = torch.zeros(4, 4, 3, 3)
    _, values = term(NOTHING, batch, None)
    assert values["boxes"] == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"terms\.objects: the model has no fusion that says boxes"):
        ObjectsTerm.build(ObjectsConfig(classes=3), FakeModel(), None)
    fit = SimpleNamespace(config=SimpleNamespace(fusion=SimpleNamespace(middle=6)))
    term = ObjectsTerm.build(ObjectsConfig(classes=3), fit, None)
    assert term.classify.in_channels == 6
    term.check(SimpleNamespace(context=("classes", "boxes"), names=("cat", "dog")))
    with pytest.raises(ValueError, match=r"samples have no classes and boxes; data\.phrases makes them"):
        term.check(SimpleNamespace(context=("depth",)))
    with pytest.raises(ValueError, match=r"terms\.objects\.classes: expected at least the data's 4, got 3"):
        term.check(SimpleNamespace(context=("classes", "boxes"), names=tuple("abcd")))
    with pytest.raises(ValidationError):
        ObjectsConfig()
