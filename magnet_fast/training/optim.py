"""The optimiser and its parameter groups: AdamW, as this family trains, or Muon; decay on weight matrices only."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import nn

from magnet_fast.training.muon import FUSED_DEVICES, Muon
from magnet_fast.training.sections import OptimiserConfig

# A projection to fewer outputs is a handful of vectors, whose lengths mean something: not for Muon.
_SMALLEST_SIDE = 8


def build_optimiser(
    model: nn.Module, config: OptimiserConfig, beside: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; each group remembers its `initial_lr` for the schedule.

    The fused implementation of AdamW is used where the device has it: one pass instead of one for every parameter or
    handful of them.
    """
    groups = parameter_groups(model, config, beside)
    if config.name == "muon":
        return Muon(groups, lr=config.lr, momentum=config.momentum, betas=config.betas, eps=config.eps)
    fused = all(parameter.device.type in FUSED_DEVICES for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def parameter_groups(model: nn.Module, config: OptimiserConfig, beside: nn.Module | None = None) -> list[dict]:
    """Groups for torch.optim: {image encoder, text encoder, the rest} x {decayed, not decayed}; empty ones
    left out. For Muon the decayed ones are split once more: its matrices (`muon=True`), and the few weights
    that are too narrow for it; `stacked` says of each parameter of how many matrices it is made.

    Weight decay falls on the weight matrices of linear and convolution layers only: not on biases, norms,
    relative position bias tables, embeddings and other free parameters. `image_multiplier` and `text_multiplier` scale
    the learning rate of `model.image_encoder` and `model.text_encoder`, which are usually pretrained; a pattern of
    `multipliers` that a name matches goes before them. Parameters that match `config.freeze` are frozen
    (`requires_grad=False`) and left out. `beside` is trained with the model and does not belong to it (the terms); its
    parameters are among the rest, and patterns of `multipliers` match their names, too: `adversarial.*`.

    Raises:
        ValueError: a pattern of `freeze` or `multipliers` matches no parameter, or everything is frozen.
    """
    freeze_parameters(model, config.freeze)
    rates = {"image": config.image_multiplier, "text": config.text_multiplier, "rest": 1.0}
    for pattern in config.multipliers:
        _matched(pattern, "multipliers", model, beside)
    groups: dict[tuple[str, bool, bool, float], dict] = {}
    described = _described_parameters(model)
    for entry in chain(described, _described_parameters(beside) if beside else ()):
        name, parameter, part, decayed, stacked = entry
        if not parameter.requires_grad:
            continue
        own = next((factor for pattern, factor in config.multipliers.items() if fnmatchcase(name, pattern)), None)
        rate = config.lr * (rates[part] if own is None else own)
        muon = config.name == "muon" and decayed and min(parameter.flatten(1).shape) >= _SMALLEST_SIDE
        group = groups.setdefault(
            (part, decayed, muon, rate),
            {
                "name": _group_name(part, decayed, muon, own),
                **({"muon": muon, "stacked": []} if config.name == "muon" else {}),
                "params": [],
                "param_names": [],
                "lr": rate,
                "initial_lr": rate,
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
        if "stacked" in group:
            group["stacked"].append(stacked)
    if not groups:
        raise ValueError("optimiser.freeze: every parameter of the model is frozen; nothing is left to train")
    return [groups[key] for key in sorted(groups)]


def freeze_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Stop training the parameters whose names match any of the shell-style patterns (`*.embeddings.*`)."""
    for pattern in patterns:
        for parameter in _matched(pattern, "freeze", model):
            parameter.requires_grad_(False)


def _matched(pattern: str, key: str, *modules: nn.Module | None) -> list[nn.Parameter]:
    named = chain(*(module.named_parameters() for module in modules if module is not None))
    matched = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
    if not matched:
        raise ValueError(f"optimiser.{key}: {pattern!r} matches no parameter of the model")
    return matched


def _group_name(part: str, decayed: bool, muon: bool, own: float | None) -> str:
    rate = "" if own is None else f", rate x {own:g}"
    return f"{part}{'' if decayed else ', no decay'}{', muon' if muon else ''}{rate}"


def _described_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str, bool, int]]:
    """(name, parameter, part, decayed, stacked) of each parameter, shared ones once."""
    part_of: dict[int, str] = {}
    for part, name in (("image", "image_encoder"), ("text", "text_encoder")):
        encoder = getattr(model, name, None)
        if encoder is not None:
            part_of.update((id(parameter), part) for parameter in encoder.parameters())
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # Multi-head attention names its projections in_proj_weight; everything else that is not called a
            # weight (bias tables, level and query embeddings) is a free parameter.
            matrix = own_name == "weight" or own_name.endswith("_weight")
            decayed = matrix and parameter.dim() >= 2 and not isinstance(module, nn.Embedding)
            name = f"{module_name}.{own_name}" if module_name else own_name
            yield name, parameter, part_of.get(id(parameter), "rest"), decayed, _stacked(module, own_name)


def _stacked(module: nn.Module, own_name: str) -> int:
    """How many projections lie one upon the other in a weight: its module says it (`stacked`), and PyTorch's own."""
    if own_name == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        return 3
    return getattr(module, "stacked", 1) if own_name == "weight" else 1
