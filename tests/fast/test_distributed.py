"""Two processes train a model with fused operators: gradients as those of the untouched model in one process."""

from __future__ import annotations

from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import magnet_fast
from magnet_fast.models import Text

from . import own, zoo

pytestmark = pytest.mark.slow

WAYS, FAMILIES = ("ddp", "fsdp"), ("timm", "own")


def build(family: str) -> nn.Module:
    return zoo.FAMILIES["timm"].model() if family == "timm" else own.small_model("magnet_tiny").double()


def layers(model: nn.Module) -> list[nn.Module]:
    """Units of sharding."""
    return model.repeated_layers() if hasattr(model, "spec") else [b for stage in model.layers for b in stage.blocks]


def loss(model: nn.Module, half: int | None = None) -> Tensor:
    """Of the whole batch of four, or of one half."""
    images = zoo.image(zoo.EVEN, batch=4)
    images = images if half is None else images.chunk(2)[half]
    if getattr(model, "family", "timm") == "timm":
        return model(images).square().mean()
    ids = torch.arange(5, 11).expand(len(images), -1)
    prediction = model(images, Text(ids, torch.ones_like(ids).bool()))
    parts = [part for each in (prediction, *prediction.earlier) for part in (each.mask, each.presence)]
    parts.append(prediction.words.features)  # else the last exchange would not say anything
    return sum(part.square().mean() for part in parts)


def process(rank: int, folder: Path) -> None:
    """Half of the batch; the first process writes the gradients down."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for way in WAYS:
        for family in FAMILIES:
            gradients = half_of_the_gradients(rank, way, family)
            if rank == 0:
                save_file(gradients, folder / f"{way} {family}")
    distributed.destroy_process_group()


def half_of_the_gradients(rank: int, way: str, family: str) -> dict[str, Tensor]:
    model = build(family)
    assert magnet_fast.accelerate(model).replaced
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    wrapped.family = family
    loss(wrapped, rank).backward()
    return {
        name: (parameter.grad if way == "ddp" else parameter.grad.full_tensor()).contiguous()
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two processes do all, forked from one that has imported all: imports take the most time."""
    folder = tmp_path_factory.mktemp("gradients")
    set_forkserver_preload([__name__])
    multiprocessing.start_processes(process, (folder,), nprocs=2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes(way: str, family: str, folder: Path) -> None:
    found = load_file(folder / f"{way} {family}")
    alone = build(family)
    alone.family = family
    loss(alone).backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(scale) + 1e-7, msg=name)
