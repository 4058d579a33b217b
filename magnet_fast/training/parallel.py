"""One model on several processes: copies that average their gradients (DDP), or shards of one (FSDP2).

State dicts are whole on the way in and out, so a checkpoint does not know how many processes wrote it, or how.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from magnet_fast.models.mask_decoder import DecoderLayer
from magnet_fast.training.distributed import World
from magnet_fast.training.recomputation import LAYERS


def synchronise_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """BatchNorms that see the whole batch of all processes; parameters and names stay.

    PyTorch has them for GPUs alone: on the CPU every process normalises over its own share.
    """
    if world.size == 1 or world.device.type != "cuda":
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def parallelise(module: nn.Module, world: World, kind: str) -> nn.Module:
    """The module for training on all processes; itself where there is one.

    Args:
        module: on the world's device, already frozen where it shall be, its optimiser not yet built.
        kind: "ddp" or "fsdp". Sharded, the module's parameters become DTensors: each process keeps a share of
            weights, gradients and optimiser state, and layers gather their weights when they run.
    """
    if world.size == 1:
        return module
    if kind == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in list(module.modules()):
            if isinstance(layer, (*LAYERS, DecoderLayer)):
                fully_shard(layer, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    # For convolutions of size 1 the two layouts it complains of are the same bytes.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    devices = [world.device] if world.device.type == "cuda" else None
    # Released architectures hold parameters that nothing uses.
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)


@contextmanager
def gradients_stay(module: nn.Module, stay: bool) -> Iterator[None]:
    """Inside, gradients pile up in each process where ``stay``: all micro-batches of a step but the last."""
    if stay and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not stay)
    yield


def whole(value: Any, keep: bool = True) -> Any:
    """A state dict, or any nesting of containers, with every sharded tensor brought together, on the CPU.

    Collective where something is sharded; a process that only helps says ``keep=False`` and gets None for those.
    """
    if isinstance(value, DTensor):
        tensor = value.detach().full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(entry, keep) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(entry, keep) for entry in value]
    return value


@torch.no_grad()
def load_whole(targets: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write whole tensors into the (sharded or not) tensors of the same names, in place.

    Raises:
        ValueError: the names differ.
    """
    if targets.keys() != state.keys():
        raise ValueError(f"checkpoint: other weights than the model's: {sorted(targets.keys() ^ state.keys())[:5]}")
    for name, target in targets.items():
        target.copy_(shard_like(target, state[name]))


def load_whole_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's whole state; each process keeps its shards of it."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    sharded = {
        index: {
            key: shard_like(parameters[index], value) if torch.is_tensor(value) and value.dim() else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimiser.load_state_dict({"state": sharded, "param_groups": state["param_groups"]})


def shard_like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, cut up as the target is."""
    if not isinstance(target, DTensor):
        return value
    # Every process has read the file: none must send. A copy, since a share may be a view that keeps the whole alive.
    value = value.to(target.to_local().device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).clone()


def whole_scalar(value: Tensor) -> Tensor:
    """A norm over shards as a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
