"""NaN is no answer: which sentences a model gives it for, and where it begins."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from magnet_fast.models.contract import Prediction, Text


def nan_answers(prediction: Prediction) -> Tensor:
    """(B,) bool on the prediction's device: whether a sentence's mask or presence holds NaN.

    Infinite logits are an answer: surely yes, or surely no.
    """
    nan = prediction.mask.flatten(1).isnan().any(dim=1)
    return nan if prediction.presence is None else nan | prediction.presence.isnan()


def where_nan_begins(
    model: nn.Module,
    image: Tensor,
    text: Text,
    context: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> str:
    """Why a model answers NaN for one sentence, in words for a message.

    Inputs and weights are looked at; then the sentence is computed once more with every layer watched. Replaced modules
    (`magnet_fast.accelerate`) run as they were written meanwhile, and compiled ones uncompiled.

    Args:
        model: in evaluation mode.
        image: (1, 3, S, S).
        text: of one sentence, (1, T).
        context: as the model takes it.
        autocast: the dtype that the model was autocast to; None for none.
    """
    given = {"image": image, **(context or {})}
    broken = next((name for name, value in given.items() if not _is_finite(value)), None)
    if broken is not None:
        return f"the {broken} that the model was given holds NaN or infinity; look at the data"
    tensors = chain(model.named_parameters(), model.named_buffers())
    broken = next((name for name, value in tensors if value.is_floating_point() and value.isnan().any()), None)
    if broken is not None:
        return f"a layer has NaN in its weights, {broken}; take an earlier checkpoint"
    first: list[tuple[str, nn.Module]] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not first and not _is_finite(output):
            first.append((name or "the model", module))

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            handle = module.register_forward_hook(
                lambda module, _, output, name=name: look(name, module, output)  # the innermost module ends first
            )
            stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(image.device.type, dtype=autocast, enabled=autocast is not None))
        prediction = model(image, text, context)
    if not nan_answers(prediction).any():
        return "computed once more, alone and without acceleration, its answer is a number; try fast=False (--no-fast)"
    name, module = first[0]
    infinite = [key for key, value in module.named_parameters() if not _is_finite(value)]
    cause = f"its {infinite[0]} is infinite" if infinite else "its weights are finite"
    return (
        f"the first layer whose output is not finite is {name} ({type(module).__name__}); {cause}: see whether "
        "float32 helps, and whether training diverged"
    )


def _is_finite(value: Any) -> bool:
    """Whether all numbers in an output are finite, however it is nested."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return True
    return all(map(_is_finite, value))
