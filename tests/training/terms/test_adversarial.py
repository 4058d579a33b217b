"""The discriminator's loss by loops in float64, whose gradient reaches the model reversed and the discriminator not."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast.models import Prediction
from magnet_fast.training.terms.adversarial import AdversarialConfig, AdversarialTerm

from ..fakes import FakeModel

SMALL = AdversarialConfig(widths=(4, 6), reversal=0.3, rise=0.2)


def made(progress: float = 1.0, size: tuple[int, int] = (16, 21)) -> tuple[AdversarialTerm, Prediction, dict]:
    torch.manual_seed(0)
    term = AdversarialTerm(SMALL).eval()  # the norms' vectors stay as they are
    batch = {
        "image": torch.randn(2, 3, *size),
        "mask": (torch.rand(2, *size) > 0.6).to(torch.uint8),
        "progress": torch.tensor(progress),
    }
    return term, Prediction(torch.randn(2, 4, 6, requires_grad=True)), batch


def slow_convolution(x: Tensor, layer: nn.Conv2d, stride: int) -> Tensor:
    weight, bias = layer.weight.double(), layer.bias.double()
    x = F.pad(x, (1, 1, 1, 1))
    side = weight.shape[2]
    height, width = ((length - side) // stride + 1 for length in x.shape[2:])
    out = x.new_zeros(len(x), len(weight), height, width)
    for i in range(height):
        for j in range(width):
            patch = x[:, :, i * stride : i * stride + side, j * stride : j * stride + side]
            out[:, :, i, j] = torch.einsum("bchw,ochw->bo", patch, weight) + bias
    return out


def halved(x: Tensor) -> Tensor:
    """(C, H, W): means over 2×2 pixels, fewer at an odd edge."""
    rows = [x[:, i : i + 2] for i in range(0, x.shape[1], 2)]
    return torch.stack(
        [torch.stack([row[:, :, j : j + 2].mean((1, 2)) for j in range(0, x.shape[2], 2)], 1) for row in rows], 1
    )


def test_equals_the_sums() -> None:
    term, prediction, batch = made()
    loss, values = term(prediction, batch, None)
    first, second, last = (layer for layer in term.discriminator if isinstance(layer, nn.Conv2d))
    image, mask = batch["image"].double(), batch["mask"].double()
    found = F.interpolate(prediction.mask.double()[:, None], size=(16, 21), mode="bilinear", align_corners=True)
    expected, right = 0.0, []
    for b in range(2):
        for true, one in ((True, 0.05 + 0.9 * mask[b]), (False, found[b, 0].sigmoid())):
            x = halved(torch.cat([image[b], one[None]]))[None]
            for layer in (first, second):
                x = slow_convolution(x, layer, 2)
                x = torch.where(x > 0, x, 0.2 * x)
            logits = slow_convolution(x, last, 1)
            assert logits.shape == (1, 1, 2, 2)
            probability = logits.sigmoid() if true else 1 - logits.sigmoid()
            expected = expected - probability.log().mean() / 2
            right.append((probability > 0.5).double().mean())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert values["told_apart"].item() == pytest.approx(torch.stack(right).mean().item())
    assert values["adversarial"] == loss


def test_convolutions_have_a_largest_singular_value_of_one() -> None:
    term = AdversarialTerm(SMALL)
    for _ in range(30):  # the vectors come nearer in training, step by step
        term(*made()[1:], None)
    for layer in term.discriminator[::2]:
        assert torch.linalg.svdvals(layer.weight.flatten(1))[0].item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.0), (0.05, 0.075), (0.2, 0.3), (1.01, 0.3)])
def test_the_model_gets_the_gradient_reversed_and_the_discriminator_its_own(progress: float, factor: float) -> None:
    term, prediction, batch = made(progress)
    term(prediction, batch, None)[0].backward()
    reversed_, own = prediction.mask.grad, [p.grad.clone() for p in term.parameters()]
    term.zero_grad()
    prediction.mask.grad = None
    term.reversal = -1.0  # so reversed twice
    term(prediction, {**batch, "progress": torch.tensor(1.0)}, None)[0].backward()
    assert prediction.mask.grad.abs().max() > 0
    torch.testing.assert_close(reversed_, -factor * prediction.mask.grad)
    for before, parameter in zip(own, term.parameters(), strict=True):
        assert before.abs().max() > 0
        torch.testing.assert_close(before, parameter.grad)


def test_small_images_and_wrong_options_are_refused() -> None:
    model = FakeModel()  # 16 pixels
    assert AdversarialTerm.build(AdversarialConfig(widths=(4, 4, 4)), model, None).training
    with pytest.raises(ValueError, match=r"terms\.adversarial\.widths: expected fewer than 4 for images of 16 pixels"):
        AdversarialTerm.build(AdversarialConfig(), model, None)
    for wrong in ({"widths": ()}, {"widths": (0,)}, {"rise": 0}, {"soft": 0.5}):
        with pytest.raises(ValidationError):
            AdversarialConfig(**wrong)
