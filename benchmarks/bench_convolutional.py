"""Convolutional models of timm, torchvision and transformers, every way of running one timed in turns.

Rows as in whole.py; "channels last" is the plain model with its weights and images in that layout. "cpu" leaves
convolutions alone, "cpu, packed weights" folds norms, activations and residuals into them. Random weights, statistics
as after some training.

Without `--full`: ResNet-50. With it: all. CRIS, the convolutional system of ours, is in bench_systems.py.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_convolutional.py --full --compile --results FILE

Floor: the operations of the plain model ("flops") and its weights read once ("bytes").
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.bench_integrations import FirstResult, deformable_detr, rt_detr, timm_model
from benchmarks.whole import BOTH, compare, only_if_wanted


class Case(NamedTuple):
    """A model, and its batch of images; `quick` is measured without --full."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    quick: bool = False
    rounds: int = 7


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return build


def transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig())


CASES = {
    "torchvision_resnet50": Case(
        "torchvision resnet50 224x224", torchvision_model("resnet50"), (1, 224, 224), quick=True
    ),
    "torchvision_resnet50_large": Case(
        "torchvision resnet50 480x480", torchvision_model("resnet50"), (1, 480, 480), rounds=5
    ),
    "timm_resnet50": Case("timm resnet50 224x224, batch 8", timm_model("resnet50"), (8, 224, 224), rounds=5),
    "timm_efficientnet_b0": Case("timm efficientnet_b0 224x224", timm_model("efficientnet_b0"), (1, 224, 224)),
    "timm_efficientnet_b0_large": Case("timm efficientnet_b0 480x480", timm_model("efficientnet_b0"), (1, 480, 480)),
    "transformers_resnet50": Case("transformers ResNet-50 224x224", transformers_resnet, (1, 224, 224)),
    "rt_detr": Case("RT-DETR ResNet-50 640x640", rt_detr, (1, 640, 640), rounds=5),
    "deformable_detr": Case("Deformable DETR ResNet-50 640x800", deformable_detr, (1, 640, 800), rounds=3),
}


def model_of(case: Case, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = case.build()
    model = FirstResult(made, [getattr(made, "main_input_name", "x")]).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.to(dtype)


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_inference(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    only_if_wanted(request, case.quick, dtype)
    batch, height, width = case.shape
    image = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = model_of(case, dtype)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    image_last = image.contiguous(memory_format=torch.channels_last)
    more = {"channels last": lambda: last(image_last)}
    compare(
        request, "convolutional", case.title, model, (image,), rounds=case.rounds, dtype=dtype, more=more, by="median"
    )
