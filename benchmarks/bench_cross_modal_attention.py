"""Cross-modal attention at the stages of Swin-B and Swin-T, 480×480, with 20 words, batch 1.

Floor, forward, for P pixels and T words with E bytes a number: every image tensor is read once and image_out
written once, P·C·E bytes each; the words' tensors stay in the cache. Each similarity and each weighted sum takes
2·P·T·C operations. The backward pass reads the image tensors and grad_image_out, writes their gradients, and takes
five products a direction, of which the shared form saves three in all. At T = 20 that is 10 operations a byte
(float32) for one direction: the caches and the matrix product bound it together.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import ops

WORDS = 20
# Pixels and width of a stage's features; the last ones are pooled pyramid levels.
STAGES = {
    "Swin-B stage 1": (14400, 128),
    "Swin-B stage 2": (3600, 256),
    "Swin-B stage 3": (900, 512),
    "Swin-B stage 4": (225, 1024),
    "Swin-T stage 1": (14400, 96),
    "Swin-T stage 2": (3600, 192),
    "Swin-T stage 3": (900, 384),
    "Swin-T stage 4": (225, 768),
    "pyramid 6x6": (36, 256),
    "pyramid 1x1": (1, 256),
}
# Heads and width: the released model's two modules and both at once, and the paper's module.
FORMS = ("pixels only", "words only", "separate", "shared")
SUBSET = {
    ("pixels only", "Swin-B stage 1"),
    ("words only", "Swin-B stage 3"),
    ("separate", "Swin-B stage 4"),
    ("shared", "Swin-B stage 2"),
    ("separate", "pyramid 6x6"),
}
PATHS = ["plain", "SDPA", "reference", "torch.compile", "cpu"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(form: str, stage: str, dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor, int]:
    """The operator's six tensors, the mask and the number of heads."""
    pixels, width = STAGES[stage]
    heads = 8 if form == "shared" else 1
    width = 256 if form == "shared" else width
    given = {
        "pixels only": (1, 1, 1, 0, 0, 0),
        "words only": (0, 0, 0, 1, 1, 1),
        "separate": (1, 1, 1, 1, 1, 1),
        "shared": (1, 1, 1, 0, 0, 1),
    }[form]
    generator = torch.Generator().manual_seed(0)
    sides = (pixels, WORDS, WORDS, WORDS, pixels, pixels)
    tensors = [
        torch.randn(1, side, width, generator=generator).to(dtype) if there else None
        for side, there in zip(sides, given, strict=True)
    ]
    return tensors, torch.ones(1, WORDS, dtype=torch.bool), heads


def split(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Two products and a softmax, with the additive mask, as models write it."""
    query, key, value = split(query, heads), split(key, heads), split(value, heads)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return join(scores.softmax(dim=-1) @ value)


def attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    query, key, value = split(query, heads), split(key, heads), split(value, heads)
    return join(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def both_directions(attention: Callable[..., Tensor], tensors: list[Tensor | None], mask: Tensor, heads: int) -> list:
    image_query, text_key, text_value, text_query, image_key, image_value = tensors
    outputs = []
    if text_value is not None:
        added = (1.0 - mask.to(text_value.dtype))[:, None, None, :] * -10000.0
        outputs.append(attention(image_query, text_key, text_value, added, heads))
    if image_value is not None:
        if text_query is None:
            text_query, image_key = text_key, image_query
        outputs.append(attention(text_query, image_key, image_value, None, heads) * mask[..., None])
    return outputs


def runner(path: str, form: str, stage: str, dtype: torch.dtype, backward: bool) -> Callable[[], list[Tensor]]:
    tensors, mask, heads = inputs(form, stage, dtype)
    leaves = [tensor.requires_grad_(backward) for tensor in tensors if tensor is not None]
    compiled = torch.compile(both_directions) if path == "torch.compile" else None

    def forward() -> list[Tensor]:
        if path == "plain":
            return both_directions(attend, tensors, mask, heads)
        if path == "SDPA":
            return both_directions(attend_fused, tensors, mask, heads)
        if compiled is not None:
            return compiled(attend, tensors, mask, heads)
        with ops.backend(path):
            outputs = ops.cross_modal_attention(*tensors, text_mask=mask, num_heads=heads)
        return [out for out in outputs if out is not None]

    grads = [torch.randn_like(out) for out in forward()] if backward else []
    return (lambda: list(torch.autograd.grad(forward(), leaves, grads))) if backward else forward


def floor(form: str, stage: str, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Compulsory traffic of the image tensors and operations of one run."""
    pixels = STAGES[stage][0]
    width = 256 if form == "shared" else STAGES[stage][1]
    # Image tensors that are read, those written, and products; the backward pass adds its own.
    read, written, products = {
        "pixels only": (1, 1, 2),
        "words only": (2, 0, 2),
        "separate": (3, 1, 4),
        "shared": (2, 1, 3),
    }[form]
    count = read + written
    if backward:
        count += 2 * read + written
        products += {"pixels only": 5, "words only": 5, "separate": 10, "shared": 7}[form]
    return {
        "bytes": count * pixels * width * dtype.itemsize,
        "flops": products * 2 * pixels * WORDS * width,
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_cross_modal_attention(benchmark, full, path, form, stage, dtype, backward) -> None:
    if not full and (form, stage) not in SUBSET:
        pytest.skip("runs with --full")
    torch.compiler.reset()
    run = runner(path, form, stage, DTYPES[dtype], backward)
    if not backward:
        expected = runner("reference", form, stage, torch.float32, False)()
        tolerance = 1e-4 if dtype == "float32" else 3e-2
        for ours, theirs in zip(run(), expected, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)
    name = f"cross-modal attention, {form}, {stage}, {dtype}, {'forward+backward' if backward else 'forward'}"
    benchmark.group = name
    benchmark.extra_info.update(path=path, baseline="plain", **floor(form, stage, DTYPES[dtype], backward))
    benchmark.pedantic(run, rounds=15, warmup_rounds=3)
