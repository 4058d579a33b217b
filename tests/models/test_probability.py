"""The one decision: from logits to the probability that a pixel belongs to what is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magnet_fast.models import Prediction, Text, probability
from magnet_fast.models.heads.mask_decoder import presence_of
from tests.models.cases import PRESETS, batch, build


def resized(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(B, h, w) to (B, H, W): bilinear, the corners of both grids on each other, the slow way."""
    _, height, width = logits.shape
    out = np.empty((len(logits), *size))
    for i in range(size[0]):
        y = i * (height - 1) / max(1, size[0] - 1)
        top = min(int(y), max(0, height - 2))
        for j in range(size[1]):
            x = j * (width - 1) / max(1, size[1] - 1)
            left = min(int(x), max(0, width - 2))
            b, r = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = (1 - dx) * logits[:, top, left] + dx * logits[:, top, r]
            lower = (1 - dx) * logits[:, b, left] + dx * logits[:, b, r]
            out[:, i, j] = (1 - dy) * upper + dy * lower
    return out


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("size", [(5, 7), (10, 14), (11, 3), (1, 1), (20, 33)], ids=str)
def test_mask_alone(size: tuple[int, int]) -> None:
    logits = np.random.RandomState(0).standard_normal((3, 5, 7)) * 4
    found = probability(Prediction(torch.from_numpy(logits).float()), size)
    assert found.dtype == torch.float32 and found.shape == (3, *size)
    np.testing.assert_allclose(found.numpy(), sigmoid(resized(logits, size)), atol=2e-6)


def test_presence_gates() -> None:
    """Below one half nothing is left; from one half on the mask is as it was."""
    mask = torch.randn(4, 5, 7)
    presence = torch.tensor([-1e-6, 0.0, 1e-6, -30.0])
    found = probability(Prediction(mask, presence), (5, 7))
    assert torch.equal(found[1:3], mask.sigmoid()[1:3])
    assert not found[0].any() and not found[3].any()


def test_presence_weighs() -> None:
    mask = torch.randn(4, 5, 7)
    presence = torch.tensor([-3.0, 0.0, 0.5, 40.0])
    found = probability(Prediction(mask, presence, presence_weighs=True), (5, 7))
    expected = sigmoid(presence.double().numpy())[:, None, None] * sigmoid(mask.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.floats(-80, 80, width=32)] * 2))
def test_the_weight_is_the_softmax_to_the_last_bit(pair: tuple[float, float]) -> None:
    classes = torch.tensor([pair])
    weight = probability(Prediction(torch.full((1, 1, 1), 60.0), presence_of(classes), presence_weighs=True), (1, 1))
    assert weight.item() == (classes.softmax(-1)[:, 1] * torch.tensor(60.0).sigmoid()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_gives_float32(dtype: torch.dtype) -> None:
    mask, presence = torch.randn(2, 5, 7).to(dtype), torch.tensor([2.0, -1.0]).to(dtype)
    found = probability(Prediction(mask, presence, presence_weighs=True), (10, 14))
    assert found.dtype == torch.float32
    assert torch.equal(found, probability(Prediction(mask.float(), presence.float(), presence_weighs=True), (10, 14)))


def pairs_of(model: torch.nn.Module, image: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """The last two logits, of nothing and of something, that the head's last layer makes: what it made before."""
    head = model.head
    layer = head.mask_decoder.class_head if hasattr(head, "mask_decoder") else head.classify
    seen = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        prediction = model(image, text)
    hook.remove()
    return seen[-1], prediction.mask


@pytest.mark.parametrize("size", [None, (51, 38)], ids=str)
def test_magnet_predicts_exactly_as_before(size: tuple[int, int] | None) -> None:
    model = build(PRESETS["magnet"])
    image, text = batch()
    classes, masks = pairs_of(model, image, text)
    logits = torch.nn.functional.interpolate(
        masks[:, None].float(), size=size or image.shape[-2:], mode="bilinear", align_corners=True
    )
    expected = (classes.float().softmax(dim=-1)[..., 1][:, :, None, None] * logits.sigmoid())[:, 0]
    assert torch.equal(model.predict(image, *text, size=size), expected)


@pytest.mark.parametrize("size", [None, (51, 38)], ids=str)
def test_lavt_predicts_as_before(size: tuple[int, int] | None) -> None:
    model = build(PRESETS["lavt"])
    image, text = batch()
    pair, _ = pairs_of(model, image, text)
    logits = torch.nn.functional.interpolate(
        pair.float(), size=size or image.shape[-2:], mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(model.predict(image, *text, size=size), logits.softmax(dim=1)[:, 1], rtol=0, atol=1e-6)


def test_predict_is_the_short_form() -> None:
    """Masks of 0 and 1, as tokenizers give them, and no gradient."""
    model = build(PRESETS["magnet"])
    image, text = batch()
    found = model.predict(image, text.ids, text.mask.to(torch.int64))
    with torch.no_grad():
        assert torch.equal(found, probability(model(image, text), (64, 96)))
    assert not found.requires_grad
