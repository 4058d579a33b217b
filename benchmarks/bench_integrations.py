"""Models of timm, transformers and torchvision before and after `magnet_fast.accelerate`: inference and training steps.

Inference has the rows of whole.py; training steps are "plain", as the library runs them, and "cpu", accelerated. Random
weights; sampling offsets, which start in a regular pattern, get noise, as training gives them.

Without `--full`: inference of the models the project measures itself by. With it: every family, and training.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_integrations.py --full --results benchmarks/results/integrations_cpu.json

Both answers are compared before anything is timed. The encoder of Grounding DINO is timed twice: its deformable layers
alone, and the whole encoder with its text layers and its bidirectional attention, which are not replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import magnet_fast
from benchmarks import PACKED
from benchmarks.machine import peak_bytes
from benchmarks.whole import compare, only_if_wanted

PATHS = ["plain", "cpu"]
Step = Callable[[], Any]


class Case(NamedTuple):
    """A model and its input.

    Attributes:
        title: what the table calls it.
        build: makes the model.
        inputs: makes the arguments of a call.
        quick: whether inference is measured without --full.
        training: whether a training step is measured with --full.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    quick: bool = False
    training: bool = True


def images(batch: int, height: int, width: int, name: str = "pixel_values") -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))}


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return build


def torchvision_swin_b() -> nn.Module:
    from torchvision.models import swin_b

    return swin_b()


SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12, "image_size": 384}
SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "image_size": 224}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def swin_classifier() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(**{**SWIN_B, "window_size": 7, "image_size": 224}))


def mask2former(swin: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

        backbone = SwinConfig(**swin, out_features=STAGES)
        return Mask2FormerModel(Mask2FormerConfig(backbone_config=backbone))

    return build


def oneformer() -> nn.Module:
    from transformers import OneFormerConfig, OneFormerModel, SwinConfig

    backbone = SwinConfig(**SWIN_T, out_features=STAGES)
    return OneFormerModel(OneFormerConfig(backbone_config=backbone, is_training=False))


def oneformer_inputs() -> dict[str, Tensor]:
    return {**images(1, 512, 512)(), "task_inputs": torch.ones(1, 77, dtype=torch.long)}


def deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, use_timm_backbone=False))


def rt_detr() -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig())


@lru_cache(maxsize=1)
def grounding_dino() -> nn.Module:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoModel, SwinConfig

    backbone = SwinConfig(**SWIN_T, out_features=STAGES[1:])
    return GroundingDinoModel(GroundingDinoConfig(backbone_config=backbone, text_config=BertConfig()))


def grounding_dino_inputs() -> dict[str, Tensor]:
    words = torch.tensor([[101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102]])  # two phrases of a prompt
    return {**images(1, 640, 800)(), "input_ids": words}


class Encoder(nn.Module):
    """The encoder of Grounding DINO on the maps of an image of 640 x 800; `deformable_only` leaves the text out."""

    sizes = ((80, 100), (40, 50), (20, 25), (10, 13))

    def __init__(self, deformable_only: bool) -> None:
        super().__init__()
        self.encoder = grounding_dino().encoder
        self.deformable_only = deformable_only

    def forward(self, vision: Tensor, position: Tensor, text: Tensor) -> Tensor:
        shapes = torch.tensor(self.sizes)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        common = {"spatial_shapes": shapes, "spatial_shapes_list": list(self.sizes), "level_start_index": starts}
        ratios = torch.ones(1, len(self.sizes), 2)
        if not self.deformable_only:
            words = text.shape[1]
            return self.encoder(
                vision_features=vision,
                vision_attention_mask=torch.zeros(vision.shape[:2], dtype=torch.bool),  # True is padding, in all three
                vision_position_embedding=position,
                valid_ratios=ratios,
                text_features=text,
                text_attention_mask=torch.zeros(1, words, dtype=torch.bool),
                text_self_attention_masks=torch.zeros(1, words, words, dtype=torch.bool),
                text_position_ids=torch.arange(words)[None],
                **common,
            ).last_hidden_state_vision
        points = self.encoder.get_reference_points(list(self.sizes), ratios, device=vision.device)
        for layer in self.encoder.layers:
            vision, _ = layer.deformable_layer(
                hidden_states=vision,
                attention_mask=torch.ones(vision.shape[:2], dtype=torch.bool),
                position_embeddings=position,
                reference_points=points,
                **common,
            )
        return vision


def encoder_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = sum(height * width for height, width in Encoder.sizes)
    vision, position = (torch.randn(1, pixels, 256, generator=generator) for _ in range(2))
    return {"vision": vision, "position": position, "text": torch.randn(1, 9, 256, generator=generator)}


CASES = {
    "timm_swin_b_224": Case(
        "timm swin_base_patch4_window7_224, batch 8",
        timm_model("swin_base_patch4_window7_224"),
        images(8, 224, 224, "x"),
        quick=True,
    ),
    "timm_swin_b_384": Case(
        "timm swin_base_patch4_window12_384, batch 8",
        timm_model("swin_base_patch4_window12_384"),
        images(8, 384, 384, "x"),
        quick=True,
        training=False,  # memory: batch 2 stands for it
    ),
    "timm_swin_b_384_small": Case(
        "timm swin_base_patch4_window12_384, batch 2",
        timm_model("swin_base_patch4_window12_384"),
        images(2, 384, 384, "x"),
    ),
    "timm_swin_t_224": Case(
        "timm swin_tiny_patch4_window7_224, batch 1",
        timm_model("swin_tiny_patch4_window7_224"),
        images(1, 224, 224, "x"),
        training=False,
    ),
    "torchvision_swin_b": Case("torchvision swin_b 224x224, batch 8", torchvision_swin_b, images(8, 224, 224, "x")),
    "transformers_swin_b": Case("transformers Swin-B 224x224, batch 8", swin_classifier, images(8, 224, 224)),
    "mask2former_swin_t": Case("Mask2Former Swin-T 512x512, batch 1", mask2former(SWIN_T), images(1, 512, 512)),
    "mask2former_swin_b": Case(
        "Mask2Former Swin-B 640x640, batch 1", mask2former(SWIN_B), images(1, 640, 640), quick=True
    ),
    "oneformer": Case("OneFormer Swin-T 512x512, batch 1", oneformer, oneformer_inputs),
    "deformable_detr": Case("Deformable DETR ResNet-50 640x800, batch 1", deformable_detr, images(1, 640, 800)),
    "rt_detr": Case("RT-DETR ResNet-50 640x640, batch 1", rt_detr, images(1, 640, 640)),
    "grounding_dino": Case("Grounding DINO Swin-T 640x800, batch 1", grounding_dino, grounding_dino_inputs),
    "deformable_layers": Case(
        "Grounding DINO, deformable layers of the encoder, 640x800",
        lambda: Encoder(deformable_only=True),
        encoder_inputs,
        quick=True,
    ),
    "encoder": Case(
        "Grounding DINO, whole encoder, 640x800", lambda: Encoder(deformable_only=False), encoder_inputs, quick=True
    ),
}


@lru_cache(maxsize=1)
def model_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[case].build().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name:
            parameter.data.copy_(0.3 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def prepare(case: str, path: str) -> nn.Module:
    model = model_of(case)
    magnet_fast.restore(model)
    if path != "plain":
        assert magnet_fast.accelerate(model, pack=path == PACKED).replaced
    return model


def results(output: Any) -> list[Tensor]:
    """Every floating tensor that a model gives; what is masked out with infinities counts as 0."""
    if isinstance(output, Tensor):
        return [output.nan_to_num(0.0, 0.0, 0.0)] if output.is_floating_point() else []
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [tensor for item in output for tensor in results(item)] if isinstance(output, (list, tuple)) else []


class AllResults(nn.Module):
    """A model as a function of tensors, in the order of its arguments' `names`, that gives all results in one tensor:
    what a result does not need, a runtime that takes a graph would leave out."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in results(self.model(**dict(zip(self.names, inputs, strict=True))))])


def agree(plain: list[Tensor], ours: list[Tensor]) -> None:
    """The paths give one answer, so that their times may be compared.

    By the median: where queries are chosen by score, or pixels by a threshold, a tie can turn the last bit into another
    choice, and a few values with it.
    """
    for expected, found in zip(plain, ours, strict=True):
        assert (found - expected).abs().median() <= 1e-4 + 1e-3 * expected.abs().max()


def measure(benchmark: Any, case: str, mode: str, path: str, step: Step) -> None:
    benchmark.group = f"{CASES[case].title}, {mode}"
    benchmark.extra_info.update(path=path, baseline="plain", dtype="float32")
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info["peak_bytes"] = peak_bytes(step)


@pytest.mark.parametrize("name", CASES)
def test_inference(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    only_if_wanted(request, case.quick)
    inputs = case.inputs()
    with torch.no_grad():
        agree(*(results(prepare(name, path).eval()(**inputs)) for path in ("plain", PACKED)))
    model = AllResults(prepare(name, "plain").eval(), list(inputs))
    by = "ranks" if name == "rt_detr" else "median"
    compare(request, "integrations", case.title, model, tuple(inputs.values()), rounds=5, by=by)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.training])
def test_training_step(benchmark, full: bool, case: str, path: str) -> None:
    """Forward, backward of the mean squares of all results, AdamW at a learning rate of 0: every row has one model."""
    if not full:
        pytest.skip("--full")
    inputs = CASES[case].inputs()
    model = prepare(case, path).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        sum(tensor.square().mean() for tensor in results(model(**inputs)) if tensor.requires_grad).backward()
        optimiser.step()

    measure(benchmark, case, "training step", path, step)
    optimiser.zero_grad()
