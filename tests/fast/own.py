"""Parts and whole models of ours for tests: filled with values, and run plainly or accelerated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models import Text

from ..models.cases import SMALL

MODELS = ("magnet_tiny", "lavt_tiny")


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fill(module: nn.Module) -> nn.Module:
    """Random values of float64 in every parameter, so that every path reaches the output."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.double().parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def results(function: Callable[..., list[Tensor]], inputs: list[Tensor], module: nn.Module) -> dict[str, Tensor | None]:
    """Outputs, and the gradients of inputs and of every parameter, of a fixed weighting of the outputs."""
    module.zero_grad()
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    sum((out * values(*out.shape, seed=9, dtype=out.dtype)).sum() for out in outputs if out.requires_grad).backward()
    found = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    found |= {f"gradient of input {index}": tensor.grad for index, tensor in enumerate(inputs)}
    return found | {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def model(name: str, **overrides: object) -> nn.Module:
    """In evaluation, with gates opened and offsets away from zero, as training leaves them."""
    torch.manual_seed(0)
    made = models.create(name, text__vocab_size=100, **overrides).eval()
    generator = torch.Generator().manual_seed(2)
    for key, parameter in made.named_parameters():
        if "gate." in key or key.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def small_model(name: str) -> nn.Module:
    """For what takes its time for each module: every kind of block once."""
    return model(name, **SMALL[name.removesuffix("_tiny")][1])


def text() -> Text:
    ids = torch.randint(5, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]).bool()
    return Text(ids * mask, mask)


def outputs(made: nn.Module, image: Tensor) -> list[Tensor]:
    """Every tensor of a prediction."""
    prediction = made(image, text())
    found = [prediction.mask, prediction.presence, prediction.pixels, prediction.words.features]
    for earlier in prediction.earlier:
        found += [earlier.mask, earlier.presence]
    return [part for part in found if part is not None]
