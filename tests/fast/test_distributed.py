"""Two processes train a model with fused operators: gradients as those of the untouched model in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import magnet_fast

from . import zoo


def batch() -> Tensor:
    return zoo.image(zoo.EVEN, batch=4)


def process(rank: int, folder: Path, way: str) -> None:
    """Half of the batch; the first process writes the gradients down."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    model = zoo.FAMILIES["timm"].model()
    assert magnet_fast.accelerate(model).replaced
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for stage in model.layers:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    wrapped(batch().chunk(2)[rank]).square().mean().backward()
    gradients = {
        name: parameter.grad if way == "ddp" else parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
    }
    if rank == 0:
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, folder / "gradients")
    distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes(way: str, tmp_path) -> None:
    multiprocessing.spawn(process, (tmp_path, way), nprocs=2)
    found = load_file(tmp_path / "gradients")
    alone = zoo.FAMILIES["timm"].model()
    alone(batch()).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(scale) + 1e-7, msg=name)
