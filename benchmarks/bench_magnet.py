"""The whole model: MagNet Swin-B, 480×480, 20 words, float32, batch 1, and a training step of the tiny one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import plain
from magnet_fast import models, ops
from magnet_fast.losses import segmentation_loss

# "plain" and "plain SDPA" replace window attention alone; every other operator runs on its reference path there.
PATHS = ["plain", "plain SDPA", "reference", "cpu window attention", "auto"]


@contextmanager
def implementation(path: str) -> Iterator[None]:
    if path.startswith("plain"):
        with plain.models_use_plain_attention(fused_softmax=path == "plain SDPA"), ops.backend("reference"):
            yield
    elif path == "cpu window attention":
        with ops.backend("reference"), ops.backend("cpu", "window_attention"):
            yield
    else:
        with ops.backend(path):
            yield


def batch(count: int, side: int, words: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, side, side, generator=generator)
    input_ids = torch.randint(5, vocab, (count, words), generator=generator)
    return image, input_ids, torch.ones_like(input_ids)


@pytest.fixture(scope="module")
def magnet_swin_b() -> models.MagNet:
    torch.manual_seed(0)
    return models.build("magnet_swin_b", pretrained=False).eval()


@pytest.mark.parametrize("path", PATHS)
def test_inference(benchmark, magnet_swin_b: models.MagNet, path: str) -> None:
    inputs = batch(1, 480, 20, 30522)
    benchmark.group = "MagNet Swin-B 480x480, inference, batch 1"
    benchmark.extra_info.update(path=path, baseline="plain")
    with torch.no_grad(), implementation(path):
        benchmark.pedantic(magnet_swin_b.predict, inputs, rounds=4, warmup_rounds=1)


@pytest.mark.parametrize("path", PATHS)
def test_training_step(benchmark, path: str) -> None:
    torch.manual_seed(0)
    model = models.build("magnet_tiny")
    inputs = batch(16, 128, 20, model.config.text.vocab_size)
    mask = torch.zeros(16, 128, 128)
    mask[:, 30:60, 40:80] = 1
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        segmentation_loss(model(*inputs), mask)["total"].backward()
        optimiser.step()

    benchmark.group = "MagNet tiny 128x128, training step, batch 16"
    benchmark.extra_info.update(path=path, baseline="plain")
    with implementation(path):
        benchmark.pedantic(step, rounds=8, warmup_rounds=2)
