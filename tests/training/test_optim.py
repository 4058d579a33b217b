"""Parameter groups of the field."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from magnet_fast import models
from magnet_fast.training.optim import build_optimiser, parameter_groups
from magnet_fast.training.sections import OptimiserConfig


@pytest.fixture(scope="module")
def names_by_group() -> dict[str, list[str]]:
    model = models.create("magnet_tiny")
    config = OptimiserConfig(lr=1e-3, weight_decay=0.05, image_multiplier=0.1, text_multiplier=0.5)
    groups = parameter_groups(model, config)
    named = dict(model.named_parameters())
    for group in groups:
        assert [id(named[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(named)
    rates = {group["name"].split(",")[0]: group["initial_lr"] for group in groups}
    assert rates == pytest.approx({"image": 1e-4, "text": 5e-4, "rest": 1e-3})
    for group in groups:
        assert group["weight_decay"] == (0.0 if "no decay" in group["name"] else 0.05)
    return {group["name"]: group["param_names"] for group in groups}


def test_parts(names_by_group: dict[str, list[str]]) -> None:
    assert set(names_by_group) == {f"{part}{tail}" for part in ("image", "text", "rest") for tail in ("", ", no decay")}
    for group, names in names_by_group.items():
        prefix = {"image": "image_encoder.", "text": "text_encoder."}.get(group.split(",")[0])
        for name in names:
            if prefix:
                assert name.startswith(prefix)
            else:
                assert not name.startswith(("image_encoder.", "text_encoder."))


def test_only_weight_matrices_decay(names_by_group: dict[str, list[str]]) -> None:
    parameters = dict(models.create("magnet_tiny").named_parameters())
    for group, names in names_by_group.items():
        for name in names:
            if "no decay" not in group:
                assert name.endswith("weight")
                assert parameters[name].dim() >= 2
                assert not any(word in name for word in ("norm", "Norm", "embeddings", "bias_table"))
    spared = [name for group, names in names_by_group.items() if "no decay" in group for name in names]
    assert any("bias_table" in name for name in spared)
    assert any("word_embeddings" in name for name in spared)
    for name, parameter in parameters.items():
        if parameter.dim() < 2:
            assert name in spared


def test_lavt_has_groups_too() -> None:
    groups = parameter_groups(models.create("lavt_tiny"), OptimiserConfig())
    assert {group["name"].split(",")[0] for group in groups} == {"image", "text", "rest"}


def test_freezing_by_pattern() -> None:
    model = models.create("magnet_tiny")
    groups = parameter_groups(model, OptimiserConfig(freeze=["text_encoder.*"]))
    assert not any(name.startswith("text_encoder.") for group in groups for name in group["param_names"])
    assert not any(parameter.requires_grad for parameter in model.text_encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.image_encoder.parameters())
    with pytest.raises(ValueError, match="optimiser.freeze: 'bert.*' matches no parameter"):
        parameter_groups(model, OptimiserConfig(freeze=["bert.*"]))
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        parameter_groups(model, OptimiserConfig(freeze=["*"]))


def test_parts_are_told_by_name_whatever_encoder_stands_there() -> None:
    """Another class than ours, or a subclass, has its part's learning rate all the same."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.text_encoder = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
            self.head = nn.Linear(8, 8)

    terms = nn.ModuleDict({"own": nn.Linear(8, 8)})
    config = OptimiserConfig(lr=1.0, image_multiplier=0.1, text_multiplier=0.5)
    rates = {}
    for group in parameter_groups(Whole(), config, terms):
        rates |= {name.split(".")[0]: group["lr"] for name in group["param_names"]}
    assert rates == {"image_encoder": 0.1, "text_encoder": 0.5, "head": 1.0, "own": 1.0}


def test_shared_parameters_are_listed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    optimiser = build_optimiser(Tied(), OptimiserConfig())
    assert sum(len(group["params"]) for group in optimiser.param_groups) == 3
    assert isinstance(optimiser, torch.optim.AdamW)


def test_multipliers_go_before_those_of_parts() -> None:
    model = models.create("cris_tiny")
    config = OptimiserConfig(lr=1e-4, image_multiplier=0.1, text_multiplier=0.1, multipliers={"*.positions": 1.0})
    groups = parameter_groups(model, config)
    rates = {name: group["initial_lr"] for group in groups for name in group["param_names"]}
    assert rates["image_encoder.pool.positions"] == rates["text_encoder.positions"] == 1e-4
    assert rates["text_encoder.norm.weight"] == pytest.approx(1e-5) and rates["fusion.neck.coarse.0.weight"] == 1e-4
    assert any(group["name"] == "image, no decay, rate x 1" for group in groups)
    with pytest.raises(ValueError, match=r"optimiser.multipliers: 'nowhere\*' matches no parameter"):
        parameter_groups(model, OptimiserConfig(multipliers={"nowhere*": 2.0}))


def test_multipliers_are_of_terms_too() -> None:
    terms = nn.ModuleDict({"adversarial": nn.Linear(8, 8), "category": nn.Linear(8, 8)})
    groups = parameter_groups(nn.Linear(8, 8), OptimiserConfig(lr=1e-4, multipliers={"adversarial.*": 3.0}), terms)
    rates = {name: group["initial_lr"] for group in groups for name in group["param_names"]}
    assert rates["adversarial.weight"] == rates["adversarial.bias"] == pytest.approx(3e-4)
    assert rates["category.weight"] == rates["weight"] == 1e-4
