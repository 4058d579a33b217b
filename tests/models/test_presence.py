"""The presence part: logits from pixels and words, detached from the model, on any head that does not say it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from magnet_fast import models
from magnet_fast.models import Text

EXIST = {"kind": "exist", "stage": 2, "width": 16, "heads": 4}


def batch() -> tuple[torch.Tensor, Text]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return torch.randn(3, 3, 64, 48, generator=generator), Text(torch.randint(4, 90, (3, 7), generator=generator), mask)


def test_logits_are_the_formulas() -> None:
    torch.manual_seed(1)
    model = models.create("lavt_tiny", presence=EXIST).eval().double()
    image, text = batch()
    with torch.no_grad():
        features = model.encode(image, text)
        found = model(image, text).presence
        part = model.presence
        pixels, words = features.maps[2].flatten(1, 2), features.words.features
        q, k, v = (
            layer(x).unflatten(2, (4, 4)).transpose(1, 2)
            for layer, x in ((part.query, pixels), (part.key, words), (part.value, words))
        )
        scores = (q @ k.transpose(2, 3) / 2.0).masked_fill(~text.mask[:, None, None], -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        expected = part.classify(part.output(attended).mean(1))[:, 0]
    assert found.shape == (3,)
    torch.testing.assert_close(found, expected)


def test_it_never_moves_the_model_and_learns_itself() -> None:
    model = models.create("lavt_tiny", presence=EXIST)
    prediction = model(*batch())
    F.binary_cross_entropy_with_logits(prediction.presence, torch.tensor([1.0, 0.0, 1.0])).backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"presence"}
    assert all(p.grad is not None for p in model.presence.parameters())


def test_it_empties_the_mask() -> None:
    model = models.create("lavt_tiny", presence=EXIST).eval()
    with torch.no_grad():
        model.presence.classify.weight.zero_()
        model.presence.classify.bias.fill_(-0.1)
        image, text = batch()
        assert not model.predict(image, *text).any()
        model.presence.classify.bias.fill_(0.1)
        assert model.predict(image, *text).any()


@pytest.mark.parametrize(
    ("name", "presence", "message"),
    [
        ("magnet_tiny", EXIST, "the head 'mask2former' says it already"),
        ("lavt_tiny", {**EXIST, "stage": 4}, "stage=4: this model has stages 0 to 3"),
        ("lavt_tiny", {**EXIST, "heads": 5}, "heads=5 does not divide width=16"),
        ("lavt_tiny", {"kind": "oracle"}, "no presence part 'oracle'; known are exist"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_configuration_is_read(name: str, presence: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config(name, presence=presence)
