"""Convolutional models of timm, torchvision and transformers, every way of running one timed in turns.

"plain" is the model as its library makes it, "channels last" the same with its weights and images in that layout; "cpu"
after `accelerate(model)`, which leaves convolutions alone, and "cpu, packed weights" after `accelerate(model,
pack=True)`, which folds norms, activations and residuals into them. The rivals have the plain model: "torch.compile"
(with `--compile`), and "OpenVINO" where it is installed (extra `bench`) and the model can be exported. Random weights,
statistics as after some training. Answers are compared before anything is timed, by their medians: where queries are
chosen by score, the last bit can choose others.

Without `--full`: ResNet-50. With it: all. CRIS, the convolutional system of ours, is in bench_systems.py.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_convolutional.py --full --compile --results FILE

Floor: the operations of the plain model ("flops") and its weights read once ("bytes").
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from benchmarks import PACKED
from benchmarks.bench_integrations import deformable_detr, results, rt_detr, timm_model
from benchmarks.bench_magnet import operations
from benchmarks.rivals import OPENVINO, openvino
from benchmarks.turns import in_turns
from magnet_fast.ops import _linear


class Case(NamedTuple):
    """A model, and its batch of images.

    Attributes:
        exported: whether OpenVINO gets it; the export of the detectors has not been tried.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    quick: bool = False
    rounds: int = 7
    exported: bool = True


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
    "rt_detr": Case("RT-DETR ResNet-50 640x640", rt_detr, (1, 640, 640), rounds=5, exported=False),
    "deformable_detr": Case(
        "Deformable DETR ResNet-50 640x800", deformable_detr, (1, 640, 800), rounds=3, exported=False
    ),
}


class FirstResult(nn.Module):
    """A model as a function of a tensor that gives one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return results(self.model(image))[0]


def model_of(case: Case, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = FirstResult(case.build()).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_inference(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    if not case.quick and not request.config.getoption("--full"):
        pytest.skip("--full")
    if dtype == torch.bfloat16 and not _linear._works(dtype):
        pytest.skip("this processor does not multiply bfloat16")
    batch, height, width = case.shape
    image = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = model_of(case, dtype)
    ours, packed, last = copy.deepcopy(first), copy.deepcopy(first), copy.deepcopy(first)
    magnet_fast.accelerate(ours)
    magnet_fast.accelerate(packed, pack=True)
    last.to(memory_format=torch.channels_last)
    image_last = image.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: first(image),
        "channels last": lambda: last(image_last),
        "cpu": lambda: ours(image),
        PACKED: lambda: packed(image),
    }
    if request.config.getoption("--compile"):
        compiled = torch.compile(copy.deepcopy(first), dynamic=False)
        runs["torch.compile"] = lambda: compiled(image)
    if case.exported and (rival := openvino(copy.deepcopy(first), (image,))) is not None:
        runs[OPENVINO] = rival
    with torch.no_grad():
        truth = runs["plain"]().float()
        for path, run in runs.items():
            error = (run().float() - truth).abs().median() / truth.abs().max()
            assert error < (1e-4 if dtype == torch.float32 else 0.1), f"{path}: {error:.2g} beside the plain form"
        weights = sum(p.numel() * p.element_size() for p in first.parameters())
        flops = operations(lambda: first(image))
        info = {"dtype": str(dtype).removeprefix("torch."), "flops": flops, "bytes": weights}
        rows = in_turns(runs, "plain", case.rounds, request.config._ceilings, **info)
    group = f"{case.title}, inference, {info['dtype']}"
    request.config._turns += [{"suite": "convolutional", "group": group, **row} for row in rows]
