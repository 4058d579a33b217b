"""One objective on several processes: copies that average their gradients (DDP), or shards of one (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from magnet_fast.training.distributed import World
from magnet_fast.training.objective import Objective


def synchronise_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """BatchNorms that see the whole batch of all processes; parameters and names stay.

    PyTorch has them for GPUs alone: on the CPU every process normalises over its own share.
    """
    if world.size == 1 or world.device.type != "cuda":
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def parallelise(objective: Objective, world: World, kind: str) -> nn.Module:
    """The module for training on all processes; the objective itself where there is one.

    Args:
        objective: on the world's device, already frozen where it shall be, its optimiser not yet built.
        kind: "ddp" or "fsdp". Sharded, the parameters become DTensors: each process keeps a share of weights,
            gradients and optimiser state, and the repeated layers gather their weights when they run.
    """
    if world.size == 1:
        return objective
    if kind == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in objective.repeated_layers():
            fully_shard(layer, mesh=mesh)
        return fully_shard(objective, mesh=mesh)
    # For convolutions of size 1 the two layouts it complains of are the same bytes.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    devices = [world.device] if world.device.type == "cuda" else None
    # Released architectures hold parameters that nothing uses.
    return DistributedDataParallel(objective, device_ids=devices, find_unused_parameters=True)


@contextmanager
def gradients_stay(module: nn.Module, stay: bool) -> Iterator[None]:
    """Inside, gradients pile up in each process where `stay`: all micro-batches of a step but the last."""
    if stay and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not stay)
    yield


def whole_on_cpu(value: Tensor) -> Tensor:
    """A tensor, sharded or not, brought together in every process. Collective where it is sharded."""
    return (value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()).cpu()


def whole_scalar(value: Tensor) -> Tensor:
    """A norm over shards as a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
