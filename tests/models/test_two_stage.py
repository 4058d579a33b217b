"""The global gate by its formulas in float64, and exchanges that begin at a later stage."""

from __future__ import annotations

import math

import pytest
import torch

from magnet_fast import models
from magnet_fast.models.heads.global_gate import PIXELS, SENTENCE
from tests.models.cases import batch, build, open_gates

CASE = ("two_stage_tiny", {})


def test_the_gate_is_the_formulas() -> None:
    model = build(CASE)
    open_gates(model)
    model.double()
    image, text = batch((67, 45))
    with torch.no_grad():
        features = model.encode(image, text)
        prediction = model(image, text)
        head, d = model.head, model.head.pixel_channels
        s, coarse = features.words.sentence, features.maps[-1].flatten(1, 2)
        gated = [torch.empty(2, *x.shape[1:3], d, dtype=torch.float64) for x in features.maps]
        for b in range(2):
            read = head.find
            query = read.query.weight @ s[b] + read.query.bias
            scores = [query @ (read.key.weight @ x + read.key.bias) / math.sqrt(d) for x in coarse[b]]
            weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            v = sum(w * (read.value.weight @ x + read.value.bias) for w, x in zip(weights, coarse[b], strict=True))
            t = head.sentence.weight @ s[b] + head.sentence.bias
            first, last = head.gate[0], head.gate[2]
            hidden = (first.weight @ torch.cat([v, t]) + first.bias).clamp(min=0)
            g = 1 / (1 + (-(last.weight @ hidden + last.bias)).exp())
            torch.testing.assert_close(prediction.extra[PIXELS][b], v)
            torch.testing.assert_close(prediction.extra[SENTENCE][b], t)
            for x, projection, out in zip(features.maps, head.projections, gated, strict=True):
                out[b] = (x[b] @ projection.weight.T + projection.bias) * (1 + g)
        expected = head.topdown(features._replace(maps=gated))
    torch.testing.assert_close(prediction.mask, expected.mask)
    torch.testing.assert_close(prediction.pixels, expected.pixels)
    assert prediction.extra.keys() == {PIXELS, SENTENCE}


def test_exchanges_begin_at_the_second_stage() -> None:
    model = build(CASE)
    open_gates(model)
    assert len(model.fusion.stages) == 3 and model.fusion.stages[-1].image_gate is None
    image, text = batch()
    with torch.no_grad():
        features = model.encode(image, text)
        encoder = model.image_encoder
        x = encoder.stage(0, encoder.start(image))
        torch.testing.assert_close(features.maps[0], x)
        other = model.encode(image, models.Text(text.ids.flip(1), text.mask.flip(1)))
    same = [torch.equal(one, two) for one, two in zip(features.maps, other.maps, strict=True)]
    assert same == [True, False, False, False]
    with pytest.raises(ValueError, match=r"fusion\.first=4: the image encoder has 4 stages"):
        models.preset_config("two_stage_tiny", fusion__first=4)
