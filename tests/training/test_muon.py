"""Muon: against torch.optim.Muon and AdamW, its grouping, its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from magnet_fast import models
from magnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from magnet_fast.training.muon import Muon, orthogonalise
from magnet_fast.training.optim import build_optimiser
from magnet_fast.training.sections import OptimiserConfig


def trained(module: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 5, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimiser.step()
    return module


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_matrices_move_as_under_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape, bias=False)
    other = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    theirs = torch.optim.Muon(
        other.parameters(), lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": list(layer.parameters()), "muon": True, "weight_decay": 0.1}]
    trained(layer, Muon(groups, lr=1e-2, momentum=0.9))
    trained(other, theirs)
    moved, expected = layer.weight - before, other.weight - before
    # Theirs iterates in bfloat16, and its momentum is a sum where ours is a mean: a factor, which drops out.
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.03 * expected.abs().max().item())


def test_other_groups_move_as_under_adamw() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 7)
    other = copy.deepcopy(layer)
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    groups = [{"params": list(layer.parameters()), "weight_decay": 0.2}]
    trained(layer, Muon(groups, **arguments))
    trained(other, torch.optim.AdamW(other.parameters(), weight_decay=0.2, fused=True, **arguments))
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


def test_orthogonalise() -> None:
    matrices = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrices[2] = 0
    found = orthogonalise(matrices)
    left, _, right = torch.linalg.svd(matrices[:2], full_matrices=False)
    values = left.mT @ found[:2] @ right.mT  # diagonal, if the singular vectors are the same
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.6).all() and (diagonal < 1.3).all()
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-5)
    assert found.dtype == torch.float64 and (found[2] == 0).all()


def test_kernels_are_matrices_and_stacked_projections_three_of_them() -> None:
    torch.manual_seed(0)
    stacked, kernel = nn.Linear(8, 24, bias=False), nn.Conv2d(4, 6, 3, bias=False)
    parts = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    flat = nn.Linear(36, 6, bias=False)
    with torch.no_grad():
        for part, weight in zip(parts, stacked.weight.chunk(3), strict=True):
            part.weight.copy_(weight)
        flat.weight.copy_(kernel.weight.flatten(1))
    gradient = torch.randn(24, 8)
    stacked.weight.grad = gradient
    for part, piece in zip(parts, gradient.chunk(3), strict=True):
        part.weight.grad = piece.clone()
    kernel.weight.grad = torch.randn(6, 4, 3, 3)
    flat.weight.grad = kernel.weight.grad.flatten(1).clone()
    before = stacked.weight.detach().clone()
    for modules, marks in (([stacked, kernel], [3, 1]), ([*parts, flat], None)):
        group = {"params": [module.weight for module in modules], "muon": True}
        Muon([group if marks is None else {**group, "stacked": marks}], lr=0.1).step()
    torch.testing.assert_close(stacked.weight, torch.cat([part.weight for part in parts]))

    # The same weight without its mark is one matrix: shapes are not guessed from.
    whole = nn.Parameter(before.clone())
    whole.grad = gradient
    Muon([{"params": [whole], "muon": True}], lr=0.1).step()
    step = (before - whole) / (0.1 * 0.2 * 24**0.5)
    torch.testing.assert_close(step, orthogonalise(gradient[None] * (1 - 0.95**2))[0], rtol=0, atol=1e-4)
    assert not torch.allclose(whole, stacked.weight, atol=1e-3)
    torch.testing.assert_close(kernel.weight.flatten(1), flat.weight)


def test_groups_of_a_model() -> None:
    model = models.create("magnet_tiny")
    optimiser = build_optimiser(model, OptimiserConfig(name="muon", lr=1e-3, momentum=0.9))
    named = dict(model.named_parameters())
    assert sorted(n for group in optimiser.param_groups for n in group["param_names"]) == sorted(named)
    taken = {name for group in optimiser.param_groups if group["muon"] for name in group["param_names"]}
    assert all(named[name].dim() >= 2 and name.endswith("weight") for name in taken)
    assert "mask_decoder.class_head.weight" not in taken  # two rows
    assert not any("embeddings" in name or "bias_table" in name for name in taken)
    share = sum(named[name].numel() for name in taken) / sum(p.numel() for p in named.values())
    assert share > 0.9
    marks = {
        name: count
        for group in optimiser.param_groups
        for name, count in zip(group["param_names"], group["stacked"], strict=True)
    }
    assert {name.rsplit(".", 2)[-2] for name, count in marks.items() if count == 3} == {"qkv"}
    assert all(count == (3 if ".qkv.weight" in name else 1) for name, count in marks.items())
    assert {group["momentum"] for group in optimiser.param_groups} == {0.9}
    with pytest.raises(ValueError, match=r"groups: Muon takes matrices.*\(7,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(7))], "muon": True}], lr=1.0)
    weight = nn.Parameter(torch.zeros(8, 2))
    with pytest.raises(ValueError, match=r"stacked=3 does not divide a parameter of \(8, 2\)"):
        Muon([{"params": [weight], "muon": True, "stacked": [3]}], lr=1.0)
    with pytest.raises(ValueError, match="stacked has 2 entries for 1 parameters"):
        Muon([{"params": [weight], "muon": True, "stacked": [1, 1]}], lr=1.0)


def test_a_projection_three_times_as_high_as_wide_is_not_taken_for_stacked() -> None:
    """A key of the words' to the pixels' width was cut into three because of its shape."""
    model = nn.Module()
    model.key = nn.Linear(16, 48, bias=False)
    model.attention = nn.MultiheadAttention(16, 2)
    (group,) = (g for g in build_optimiser(model, OptimiserConfig(name="muon")).param_groups if g["muon"])
    marks = dict(zip(group["param_names"], group["stacked"], strict=True))
    assert marks == {"key.weight": 1, "attention.in_proj_weight": 3, "attention.out_proj.weight": 1}


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(8, 9)
        groups = [{"params": [layer.weight], "muon": True}, {"params": [layer.bias]}]
        return layer, Muon(groups, lr=1e-2)

    whole, optimiser = fresh()
    trained(trained(whole, optimiser), optimiser, seed=1)
    first, optimiser = fresh()
    trained(first, optimiser)
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    save_checkpoint({"optimiser": optimiser.state_dict()}, tmp_path / "checkpoint.safetensors")
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint.safetensors")["optimiser"])
    trained(second, resumed, seed=1)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
