"""Language-driven attention against its formulas, in float64, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from magnet_fast import models
from magnet_fast.models.fusion.lda import LDAStage
from tests.models.cases import batch, build
from tests.models.plain_forms import layer_norm, linear, randomised


@pytest.mark.parametrize(("channels", "size"), [(8, (3, 5)), (3, (1, 1)), (4, (7, 2))])
@pytest.mark.parametrize("gated", [True, False])
def test_stage_is_its_formula(channels: int, size: tuple[int, int], gated: bool) -> None:
    stage = randomised(LDAStage(channels, 6, gated=gated))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *size, channels, generator=generator, dtype=torch.float64)
    sentence = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    output, stream = stage(x, sentence)
    narrow, _, wide = stage.channel_attention
    for b in range(2):
        mean = x[b].reshape(-1, channels).sum(0) / (size[0] * size[1])
        hidden = linear(torch.cat([mean, linear(sentence[b], stage.sentence)]), narrow).clamp(min=0)
        channel = 1 / (1 + (-linear(hidden, wide)).exp())
        for row in range(size[0]):
            for column in range(size[1]):
                pixel = x[b, row, column]
                place = linear(pixel, stage.query) @ linear(sentence[b], stage.key) / math.sqrt(channels)
                place = 1 / (1 + (-place).exp())
                joined = torch.cat([pixel * channel, pixel * place, pixel * channel * place])
                fused = layer_norm(linear(joined, stage.mix), stage.mix_norm).clamp(min=0)
                torch.testing.assert_close(output[b, row, column], layer_norm(fused, stage.norm))
                expected = pixel
                if gated:
                    gate = linear(linear(fused, stage.gate.first).clamp(min=0), stage.gate.last).tanh()
                    expected = pixel + gate * fused
                torch.testing.assert_close(stream[b, row, column], expected)


def test_only_the_sentence_is_read() -> None:
    """Words in another order make the same sentence, which is their mean, and so the same masks."""
    model = build(("lda_tiny", {}))
    image, text = batch()
    with torch.no_grad():
        words = model.text_encoder.start(text)
        step = model.fusion(1, torch.randn(2, 4, 4, 32), words, None, {})
        flipped = model.fusion(1, torch.randn(2, 4, 4, 32), words._replace(features=words.features.flip(2)), None, {})
        assert not torch.equal(step.output, flipped.output)
        pooled = words._replace(features=torch.zeros_like(words.features), pooled=words.sentence)
        x = torch.randn(2, 4, 4, 32)
        torch.testing.assert_close(model.fusion(1, x, pooled, None, {})[:2], model.fusion(1, x, words, None, {})[:2])


def test_stages_that_do_not_fuse_give_the_head_nothing() -> None:
    model = build(("lda_tiny", {"fusion__stages": (0, 3)}))
    assert model.config.shapes.channels == (16, 128) and model.config.shapes.strides == (4, 32)
    assert set(model.fusion.stages) == {"0", "3"} and model.fusion.stages["3"].gate is None
    assert len(model.encode(*batch()).maps) == 2
    every = models.preset_config("lda_tiny", fusion__stages=None, head={"kind": "topdown"})
    assert every.shapes.channels == (16, 32, 64, 128)


@pytest.mark.parametrize("stages", [(), (1, 1), (2, 1), (0, 4), (-1,)])
def test_refused_stages(stages: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"fusion.stages=\(.*\): expected some of 0 to 3 in order, each once"):
        models.preset_config("lda_tiny", fusion__stages=stages)
