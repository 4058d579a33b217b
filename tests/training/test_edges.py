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
