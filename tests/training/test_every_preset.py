"""Each small preset of the registry on two processes that wait for every gradient; and a loss over both of them."""

from __future__ import annotations

import json

import pytest
import torch

from magnet_fast import models
from magnet_fast.training.terms.global_alignment import global_alignment_loss

from .every_preset import pairs
from .processes import run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("presets")
    run_module("every_preset", folder)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_every_parameter_of_every_preset_gets_a_gradient_that_both_share(found: list[dict]) -> None:
    for entry in found:
        presets = {name: step for name, step in entry.items() if name != "aligned"}
        assert sorted(presets) == models.list_models("*_tiny")
        assert {name: step for name, step in presets.items() if step["without"] or step["unlike"]} == {}


def test_pairs_of_both_processes_are_compared_as_in_one(found: list[dict]) -> None:
    layer, pictures, sentences, *given = pairs()
    loss = global_alignment_loss(layer(pictures), layer(sentences), *given, 0.2)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in layer.parameters()])
    for entry in found:
        value, mean = entry["aligned"]
        assert value == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(mean), gradient, rtol=1e-4, atol=1e-6)
