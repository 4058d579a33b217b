"""Words that modulate pixels and a sentence that gathers their context, against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import Features, Words
from magnet_fast.models.config import Shapes
from magnet_fast.models.fusion.word_film import WordFilm
from magnet_fast.models.heads.sentence_context import Context, SentenceContextConfig
from tests.models.cases import PRESETS, batch, build
from tests.models.plain_forms import conv_block, convolve, layer_norm, linear, pooled, randomised, resize

_DILATED = {"output_stride": 16}


def words(count: int, masked: int, width: int = 6) -> Words:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[1, count - masked :] = False
    return Words(torch.randn(2, count, width, generator=generator, dtype=torch.float64), mask)


@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("heads", [1, 2])
def test_film_is_its_formula(count: int, heads: int) -> None:
    film, read = randomised(WordFilm(4, 6, heads)), words(count, count // 2)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    found = film(x, *read[:2])
    for b in range(2):
        kept = read.features[b][read.mask[b]]
        key, value = linear(kept, film.key), linear(kept, film.value)
        for row in range(3):
            for column in range(5):
                pixel = x[b, row, column]
                query, seen = linear(pixel, film.query), []
                for h in range(heads):
                    part = slice(4 // heads * h, 4 // heads * (h + 1))
                    weights = (key[:, part] @ query[part] / math.sqrt(4 // heads)).softmax(0)
                    seen.append(weights @ value[:, part])
                modulation = linear(torch.cat(seen), film.modulate)
                expected = (1 + modulation[:4].tanh()) * pixel + modulation[4:]
                torch.testing.assert_close(found[b, row, column], expected)


def test_film_starts_as_nothing() -> None:
    """The stream is the encoder's own, and the head gets its norm."""
    model = build(PRESETS["wgfm"])
    image, text = batch()
    with torch.no_grad():
        features, stream = model.encode(image, text), model.image_encoder.start(image)
        maps = []
        for i in range(4):
            maps.append(model.image_encoder.stage(i, stream))
            stream = model.image_encoder.descend(i, maps[-1])
    for found, plain in zip(features.maps, maps[1:], strict=True):
        expected = torch.nn.functional.layer_norm(plain, plain.shape[-1:])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_film_leaves_finer_stages_alone() -> None:
    config = models.preset_config("wgfm_tiny")
    assert config.shapes.strides == (8, 16, 32) and config.shapes.channels == config.image.channels[1:]
    assert models.preset_config("wgfm_tiny", fusion__stages=None).shapes.strides == (4, 8, 16, 32)
    dilated = models.preset_config("wgfm_tiny", image={"kind": "timm", "name": "test_resnet", "arguments": _DILATED})
    assert dilated.shapes.strides == (8, 16, 16)
    for stages in ((), (2, 1), (3, 4), (-1,), (1, 1)):
        with pytest.raises(ValueError, match=r"fusion.stages=\(.*\): expected some of 0 to 3 in order, each once"):
            models.preset_config("wgfm_tiny", fusion__stages=stages)
    with pytest.raises(ValueError, match=r"fusion.heads=5 does not divide a stage's 32 channels"):
        models.preset_config("wgfm_tiny", fusion__heads=5)


def context_of(x: Tensor, sentence: Tensor, context: Context) -> Tensor:
    """The formula, (B, H, W, C) to (B, C, H, W), row by row of the batch."""
    joined = []
    for pixels, s in zip(x.flatten(1, 2), sentence, strict=True):
        weights = (linear(pixels, context.read.key) @ linear(s, context.read.query) / math.sqrt(x.shape[3])).softmax(0)
        whole = torch.cat([weights @ linear(pixels, context.read.value), linear(s, context.sentence)])
        joined.append(torch.stack([torch.cat([pixel, whole]) for pixel in pixels]))
    joined = torch.stack(joined).transpose(1, 2).unflatten(2, x.shape[1:3])
    return conv_block(joined, context.join)


def test_head_is_its_formula() -> None:
    """Maps of sizes that do not halve, two of one size among them."""
    shapes = Shapes((3, 4, 5), (8, 16, 16), 6, 6, (None,) * 3)
    head = randomised(SentenceContextConfig(width=4, dilations=(1, 2)).build(shapes))
    maps = [torch.randn(2, *size, dtype=torch.float64) for size in ((5, 7, 3), (3, 4, 4), (3, 4, 5))]
    read = words(5, 2)
    found = head(Features(maps, read, [None] * 3, (40, 56)))
    sentence = torch.stack([each[kept].mean(0) for each, kept in zip(*read[:2], strict=True)])
    seen = [
        context_of(linear(x, lateral), sentence, context)
        for x, lateral, context in zip(maps, head.lateral, head.contexts, strict=True)
    ]
    x = conv_block(seen[1] + seen[2], head.smooth[1])
    x = conv_block(seen[0] + resize(x, (5, 7)), head.smooth[0])
    expected = pooled(x, head.aspp)
    torch.testing.assert_close(found.pixels, expected)
    torch.testing.assert_close(found.mask, convolve(expected, head.classify)[:, 0])


def test_output_is_the_norm_of_the_stream() -> None:
    fusion = randomised(build(PRESETS["wgfm"]).fusion)
    x, read = torch.randn(2, 3, 2, 32, dtype=torch.float64), words(4, 1, width=64)
    step = fusion(1, x, read, None, {})
    torch.testing.assert_close(step.output, layer_norm(step.stream, fusion.norms["1"]))
    assert (step.stream - x).abs().max() > 0.1
    first = torch.randn(2, 6, 4, 16, dtype=torch.float64)
    step = fusion(0, first, read, None, {})
    assert step.output is None and step.stream is first
