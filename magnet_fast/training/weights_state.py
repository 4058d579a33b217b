"""Weights and optimiser states without a trace of how many processes hold them: whole on the way out and in.

`torch.distributed.checkpoint.state_dict` does it, with parameters named as the objective names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_WHOLE_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The whole weights, copied to the CPU; on the first process alone. Collective."""
    state = get_model_state_dict(module, options=_WHOLE_ON_MAIN)
    return {name: value.clone() for name, value in state.items()}


def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Write whole weights into a module, sharded or not; every process gives them all.

    Raises:
        ValueError: names or shapes differ.
    """
    known, given = ({name: value.shape for name, value in each.items()} for each in (module.state_dict(), state))
    if known != given:
        differing = sorted({name for name, _ in known.items() ^ given.items()})
        raise ValueError(f"checkpoint: other weights than the model's: {differing[:5]}")
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))


def optimiser_state_of(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state by the parameters' names, on the CPU; on the first process alone. Collective."""
    return get_optimizer_state_dict(module, optimiser, options=_WHOLE_ON_MAIN)


def load_optimiser_state(module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from what `optimiser_state_of` gave; every process gives all of it and keeps its shards."""
    options = StateDictOptions(full_state_dict=True, strict=False)  # a parameter without gradients has no state
    set_optimizer_state_dict(module, optimiser, state, options=options)
    # PyTorch has made a first state for every parameter; without one in the file it must begin at its first gradient.
    for name, parameter in module.named_parameters():
        if name not in state["state"]:
            optimiser.state.pop(parameter, None)
