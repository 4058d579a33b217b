"""A step of every system's own losses at the edges: sizes nothing divides, one word, sixty, and batches in which every
sentence names something, or none does. Losses and gradients stay finite."""

from __future__ import annotations

import pytest
import torch

from magnet_fast.models import Text
from magnet_fast.training.building import build_tokenizer
from magnet_fast.training.config import load_config
from magnet_fast.training.objective import Objective
from magnet_fast.training.terms import build_terms
from tests.models.cases import SMALL, build

SYSTEMS = ["magnet", "lavt", "refsegformer", "rela", "cris", "risam"]
CASES = {
    "one word, all": (1, (True, True, True)),
    "one word, none": (1, (False, False, False)),
    "sixty words, some": (60, (False, True, False)),
}
"""Words of the longest sentence, and which sentences of the batch name something."""


def objective(system: str) -> Objective:
    config = load_config(f"{system}_tiny_scenes_grounding")
    model = build(SMALL[system]).train()
    return Objective(model, build_terms(config.terms, model, build_tokenizer(config, model)), "float32")


def batch(words: int, exists: tuple[bool, ...], start: int, end: int) -> dict:
    """Three noisy pictures of 67 x 45; the second sentence is as long as said, the others have one word."""
    generator = torch.Generator().manual_seed(0)
    named = torch.tensor(exists)
    mask = (torch.rand(3, 67, 45, generator=generator) > 0.8) & named[:, None, None]
    ids = torch.zeros(3, words + 2, dtype=torch.int64)
    for row, count in enumerate((1, words, 1)):
        ids[row, : count + 2] = torch.tensor([start, *torch.randint(110, 300, (count,), generator=generator), end])
    image = torch.randn(3, 3, 67, 45, generator=generator)
    return {"image": image, "text": Text(ids, ids > 0), "mask": mask.float(), "exists": named}


@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_and_gradients_stay_finite(system: str) -> None:
    step = objective(system)
    tokenizer = build_tokenizer(load_config(f"{system}_tiny_scenes"), step.model)
    start, *_, end = tokenizer("square").ids[0].masked_select(tokenizer("square").mask[0]).tolist()
    for case, (words, exists) in CASES.items():
        step.zero_grad()
        losses = step(batch(words, exists, start, end))
        losses["total"].backward()
        for name, value in losses.items():
            assert value.isfinite(), f"{case}: {name}"
        for name, parameter in step.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), f"{case}: {name}"
        assert losses["total"] > 0


@pytest.mark.parametrize("system", ["cris", "risam"])
def test_images_are_looked_at_once_for_all_sentences(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask Grounding's sentence shares what the model makes of an image before words come: all numbers stay."""
    step = objective(system)
    step.model.eval()  # a BatchNorm's statistics of two passes are not those of one
    starts, found = [], []
    start = step.model.image_encoder.start
    monkeypatch.setattr(step.model.image_encoder, "start", lambda image: (starts.append(1), start(image))[1])
    for looks_first in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(type(step.model), "looks_first", looks_first)
            torch.manual_seed(1)
            step.zero_grad()
            losses = step(batch(9, (True, True, False), 101, 102))
            losses["total"].backward()
            gradients = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
            found.append((losses, gradients, len(starts)))
    (losses, gradients, once), (apart, expected, thrice) = found
    assert (once, thrice) == (1, 3) and gradients.keys() == expected.keys()
    for name, value in apart.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
