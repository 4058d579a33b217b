"""Pictures against sentences of the whole batch, by loops in float64; what takes no part, and what is zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magnet_fast.models import Prediction, Text
from magnet_fast.models.heads.global_gate import PIXELS, SENTENCE
from magnet_fast.training.terms.global_alignment import (
    GlobalAlignmentConfig,
    GlobalAlignmentTerm,
    global_alignment_loss,
)


def slow(found: Tensor, said: Tensor, image: list[int], text: list[tuple], paired: list[bool], tau: float) -> float:
    """Every pair by itself: which others it is compared with, and two sums over them."""
    a, b = ([row / row.norm() for row in side.double()] for side in (found, said))
    count = [i for i in range(len(a)) if paired[i]]
    total = 0.0
    for i in count:
        others = [j for j in count if image[j] != image[i] and text[j] != text[i]]
        own = math.exp(a[i] @ b[i] / tau)
        total -= math.log(own / (own + sum(math.exp(a[i] @ b[j] / tau) for j in others))) / 2
        total -= math.log(own / (own + sum(math.exp(a[j] @ b[i] / tau) for j in others))) / 2
    return total / max(1, len(count))


def batch(size: int) -> dict:
    torch.manual_seed(size)
    ids, mask = torch.randint(1, 3, (size, 2)), torch.rand(size, 2) > 0.2
    return {
        "text": Text(ids, mask),
        "image_id": torch.randint(0, size, (size,)),
        "exists": torch.rand(size) > 0.2,
    }


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_equals_the_sums(size: int, tau: float) -> None:
    given = batch(size)
    found, said = torch.randn(2, size, 6)
    ids, mask = given["text"]
    read = [tuple(one for one, keep in zip(*row, strict=True) if keep) for row in zip(ids.tolist(), mask, strict=True)]
    places = [tuple(row.tolist()) for row in mask]  # the same words elsewhere are another row of ids
    paired = [bool(exists) and bool(words) for exists, words in zip(given["exists"], read, strict=True)]
    text = list(zip(read, places, strict=True))
    expected = slow(found, said, given["image_id"].tolist(), text, paired, tau)
    term = GlobalAlignmentTerm(GlobalAlignmentConfig(temperature=tau))
    loss, values = term(Prediction(torch.zeros(size, 4, 4), extra={PIXELS: found, SENTENCE: said}), given, None)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6) and values["global"] == loss


@pytest.mark.parametrize("paired", [(True,), (False,), (False, False), (False, True, False)])
def test_fewer_than_two_pairs_are_zero_with_zero_gradients(paired: tuple[bool, ...]) -> None:
    size = len(paired)
    found, said = torch.zeros(2, size, 4, requires_grad=True)
    said = said + torch.randn(size, 4)
    loss = global_alignment_loss(
        found, said, torch.arange(size), torch.arange(size)[:, None], torch.tensor(paired), 0.07
    )
    assert loss == 0
    torch.autograd.backward(loss)


def test_sentences_of_one_image_and_one_sentence_of_two_images_are_not_pushed_apart() -> None:
    found, said = torch.randn(2, 3, 4), torch.randn(3, 4)
    text, yes = torch.tensor([[1], [2], [2]]), torch.ones(3, dtype=torch.bool)
    image = torch.tensor([7, 7, 8])
    loss = global_alignment_loss(found[0], said, image, text, yes, 0.1)
    assert loss > 0  # the first and the last pair
    for place in (0, 2):  # without either of them nothing is left to compare
        one = yes.clone()
        one[place] = False
        assert global_alignment_loss(found[0], said, image, text, one, 0.1) == 0


def test_a_model_without_the_gate_is_refused_by_name() -> None:
    term = GlobalAlignmentTerm(GlobalAlignmentConfig())
    with pytest.raises(ValueError, match=r"terms\.global_alignment: .*no global_pixels.*the head global_gate"):
        term(Prediction(torch.zeros(2, 4, 4)), batch(2), None)
