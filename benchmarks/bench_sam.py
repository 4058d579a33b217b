"""SAM's image encoder, every way of running it timed in turns: transformers' layers, ours, and the rivals.

Rows as in whole.py; "plain" is transformers' encoder with scaled_dot_product_attention, which gets the positions as a
mask; "eager" its own form. Random weights.

Without `--full`: one global layer of ViT-B at 1024x1024 (64x64 tokens). With it: the encoders of ViT-B and ViT-H, and
one layer of ViT-L that reads whole maps of 32x32 tokens, as cellpose 4 has twenty-four of (256x256 pixels in patches of
8).

    OMP_NUM_THREADS=2 pytest benchmarks/bench_sam.py --full --compile --results benchmarks/results/sam_cpu.json

Floor: the operations of the plain model ("flops") and its weights read once ("bytes"). Low-precision rows need a
processor that multiplies bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.whole import BOTH, Run, compare, only_if_wanted

VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "global_attn_indexes": [2, 5, 8, 11]}
VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "global_attn_indexes": [7, 15, 23, 31],
}


class Case(NamedTuple):
    """What is built: a whole encoder, or a global layer of it with maps of `side` x `side` tokens."""

    title: str
    config: dict[str, Any]
    side: int | None = None
    batch: int = 1
    rounds: int = 3
    quick: bool = False
    rivals: bool = True


CASES = {
    "layer_b": Case("SAM ViT-B, a global layer, 64x64 tokens", VIT_B, 64, rounds=5, quick=True),
    "encoder_b": Case("SAM ViT-B encoder 1024x1024", VIT_B),
    "layer_l": Case("ViT-L, a global layer, 32x32 tokens, batch 8", VIT_L, 32, batch=8, rounds=5),
    "encoder_h": Case("SAM ViT-H encoder 1024x1024", VIT_H, rounds=1, rivals=False),
}


class Maps(nn.Module):
    """An encoder as a function of tensors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(image)[0]


def build(case: Case, implementation: str) -> nn.Module:
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionLayer

    torch.manual_seed(0)
    patches = {} if case.side is None else {"image_size": 16 * case.side}
    config = SamVisionConfig(**{**case.config, **patches})
    config._attn_implementation = implementation
    model = Maps(SamVisionEncoder(config)) if case.side is None else SamVisionLayer(config, 0)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def image_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if case.side is None:
        return torch.randn(case.batch, 3, 1024, 1024, generator=generator)
    return torch.randn(case.batch, case.side, case.side, case.config["hidden_size"], generator=generator)


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_inference(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    only_if_wanted(request, case.quick, dtype)
    inputs = (image_of(case).to(dtype),)
    more: dict[str, Run] = {}
    if case.rivals:
        eager = build(case, "eager").to(dtype)
        more["eager"] = lambda: eager(*inputs)
    model = build(case, "sdpa").to(dtype)
    compare(request, "sam", case.title, model, inputs, rounds=case.rounds, dtype=dtype, more=more, rivals=case.rivals)
