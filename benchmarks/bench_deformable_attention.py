"""Deformable attention in the pixel decoder: every position of four maps is a query; 8 heads, 4 points a level.

All rows start from the raw outputs of the two Linears, offsets and logits, and end before the output projection.
"plain" is softmax, locations and `grid_sample` as implementations write them; "cpu, softmax apart" is the operator
`deformable_attention` after PyTorch's softmax and locations; "cpu" is `fused_deformable_attention`.

Floor in bytes: value, offsets and logits read once, the result written once: per query and head d + 3·16 + d numbers
(the backward pass reads these and the result's gradient, and writes three gradients). Floor in operations: 16 points
times 4 corners times d multiply-adds, and as many for the dot products and for the scatter of the backward pass. The
rows come from a slice of 4·S·d bytes, which fits the second-level cache about: the work is bound by the loads of
corners' rows, 16·4·d numbers a query and head.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import ops

SHAPES = {  # side of the picture, channels of a head
    "tiny model, 64x64": (64, 8),
    "tiny model, 128x128": (128, 8),
    "Swin, 224x224": (224, 32),
    "Swin, 384x384": (384, 32),
    "Swin, 480x480": (480, 32),
}
SMALL = ("tiny model, 128x128", "Swin, 224x224")
HEADS, LEVELS, POINTS = 8, 4, 4
PATHS = ["plain", "torch.compile", "reference", "cpu, softmax apart", "cpu"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(side: int, d: int, dtype: torch.dtype) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Maps, and value, reference points, offsets, logits. Offsets are what the decoder starts from, plus noise."""
    maps = [(side // stride, side // stride) for stride in (32, 16, 8, 4)]
    count = sum(h * w for h, w in maps)
    generator = torch.Generator().manual_seed(0)
    centres = []
    for height, width in maps:
        y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        centres.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
    direction = direction / direction.abs().amax(dim=-1, keepdim=True)
    steps = direction[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
    offsets = steps + torch.randn(1, count, HEADS, LEVELS, POINTS, 2, generator=generator)
    logits = torch.randn(1, count, HEADS, LEVELS, POINTS, generator=generator)
    value = torch.randn(1, count, HEADS, d, generator=generator)
    return maps, [value.to(dtype), torch.cat(centres), offsets.to(dtype), logits.to(dtype)]


def plain(maps: list[tuple[int, int]], value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    locations = sampling_locations(maps, reference.to(value.dtype), offsets)
    batch, _, heads, d = value.shape
    queries = offsets.shape[1]
    samples = []
    for level, part in enumerate(value.split([h * w for h, w in maps], dim=1)):
        image = part.flatten(2).transpose(1, 2).reshape(batch * heads, d, *maps[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, LEVELS * POINTS)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(batch, heads * d, queries).transpose(1, 2).contiguous()


def sampling_locations(maps: list[tuple[int, int]], reference: Tensor, offsets: Tensor) -> Tensor:
    sides = torch.tensor([(w, h) for h, w in maps], dtype=offsets.dtype, device=offsets.device)
    return reference[None, :, None, None, None] + offsets / sides[None, None, None, :, None]


def runner(path: str, name: str, dtype: torch.dtype, backward: bool):
    maps, tensors = inputs(*SHAPES[name], dtype)
    value, reference, offsets, logits = tensors
    leaves = [t.requires_grad_(backward) for t in (value, offsets, logits)]
    grad = torch.randn(1, value.shape[1], HEADS * value.shape[3], generator=torch.Generator().manual_seed(1)).to(dtype)
    written = torch.compile(plain) if path == "torch.compile" else plain

    def forward() -> Tensor:
        if path in ("plain", "torch.compile"):
            return written(maps, *tensors)
        if path == "cpu, softmax apart":
            weights = logits.flatten(3).softmax(-1).view(logits.shape)
            locations = sampling_locations(maps, reference, offsets.float())
            with ops.backend("cpu"):
                return ops.deformable_attention(value, maps, locations, weights)
        with ops.backend(path):
            return ops.fused_deformable_attention(value, maps, *tensors[1:])

    def both() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    return both if backward else forward


def floor(side: int, d: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Compulsory traffic in bytes and operations of one run."""
    places = sum((side // stride) ** 2 for stride in (32, 16, 8, 4)) * HEADS
    points = LEVELS * POINTS
    numbers, operations = 2 * d + 3 * points, 8 * points * d
    if backward:  # value, points and the gradient once more; three gradients
        numbers, operations = numbers + 3 * d + 6 * points, 3 * operations
    return {"bytes": places * numbers * dtype.itemsize, "flops": places * operations}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_deformable_attention(benchmark, full: bool, path: str, name: str, dtype: str, backward: bool) -> None:
    if not full and name not in SMALL:
        pytest.skip("only with --full")
    run = runner(path, name, DTYPES[dtype], backward)
    if not backward and dtype == "float32":
        torch.testing.assert_close(run(), runner("reference", name, DTYPES[dtype], False)(), rtol=1e-3, atol=1e-4)
    benchmark.group = f"deformable attention, {name}, {dtype}, {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info.update(path=path, baseline="plain", **floor(*SHAPES[name], DTYPES[dtype], backward))
    slow = path != "cpu" and not name.startswith("tiny")
    benchmark.pedantic(run, rounds=5 if slow else 20, warmup_rounds=1 if slow else 3)
