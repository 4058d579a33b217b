"""What two Gloo processes do in test_every_preset: a step of each small preset, whose every gradient is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from magnet_fast import models
from magnet_fast.models import Text
from magnet_fast.training.distributed import World
from magnet_fast.training.terms.global_alignment import global_alignment_loss
from tests.models.cases import batch, context_of, everything, without_gradient

from .processes import in_two_processes

PAIRS = 6


class Everything(nn.Module):
    """A model with a loss of all that it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Text, context: dict[str, Tensor]) -> Tensor:
        return everything(self.model(image, text, context))


def step_of(name: str, world: World) -> dict[str, Any]:
    """Parameters without a gradient after a step, and those whose gradient is not the same in both processes."""
    torch.manual_seed(world.rank)  # copies take the first process's weights
    model = models.create(name)
    image, text = batch((64, 64))
    image = image + 0.1 * world.rank  # each has pictures of its own
    copies = DistributedDataParallel(Everything(model))  # kept: its hooks go with it
    copies(image, text, context_of(model, image)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    sums = torch.stack([p.grad.double().sum() for p in trained.values()])
    of_all = [torch.empty_like(sums) for _ in range(world.size)]
    dist.all_gather(of_all, sums)
    unlike = [name for name, same in zip(trained, of_all[0] == of_all[1], strict=True) if not same]
    return {"without": without_gradient(model), "unlike": unlike}


def pairs() -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer, and what it is to make vectors of: pictures, sentences, their ids, and which count."""
    torch.manual_seed(5)
    found, said = torch.randn(2, PAIRS, 4)
    image, text = torch.tensor([1, 2, 2, 3, 4, 1]), torch.tensor([[1], [2], [3], [1], [4], [5]])
    return nn.Linear(4, 3), found, said, image, text, torch.tensor([True, True, True, False, True, True])


def aligned(world: World) -> tuple[float, list[float]]:
    """The global alignment of a half of the pairs in each process, and the mean of their gradients."""
    layer, *given = pairs()
    share = PAIRS // world.size
    found, said, *ids = (part[world.rank * share : (world.rank + 1) * share] for part in given)
    loss = global_alignment_loss(layer(found), layer(said), *ids, 0.2)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in layer.parameters()])
    dist.all_reduce(gradient)
    return loss.item(), (gradient / world.size).tolist()


def checks(out: Path, world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"aligned": aligned(world)}
    for name in models.list_models("*_tiny"):
        try:
            found[name] = step_of(name, world)
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
    return found


if __name__ == "__main__":
    in_two_processes(checks)
