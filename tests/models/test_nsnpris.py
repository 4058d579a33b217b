"""NSNPRIS's fusion against plain formulas, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models.fusion.bridge import (
    BridgeConfig,
    BridgeStage,
    Interaction,
    LanguageGate,
    LastExchange,
    Pair,
    Zoom,
)
from magnet_fast.models.sizes import TINY_BERT, TINY_SWIN
from tests.models.cases import PRESETS, batch, build, everything, open_gates, without_gradient

WIDTH, HEADS = 8, 2
CONFIG = BridgeConfig(width=WIDTH, num_heads=HEADS, feedforward=12)
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def made(module: nn.Module) -> Any:
    return module.double().eval()


def attention(part: nn.Module, query: Tensor, read: Tensor, mask: Tensor | None) -> Tensor:
    """Row by row and head by head; what is masked is cut off."""
    out = torch.empty_like(query)
    size = query.shape[2] // HEADS
    for b in range(len(query)):
        kept = read[b] if mask is None else read[b][mask[b]]
        q, k, v = part.query(query[b]), part.key(kept), part.value(kept)
        heads = []
        for h in range(HEADS):
            channels = slice(h * size, (h + 1) * size)
            scores = torch.einsum("nc,mc->nm", q[:, channels], k[:, channels]) / math.sqrt(size)
            heads.append(scores.softmax(1) @ v[:, channels])
        out[b] = part.output(torch.cat(heads, dim=1))
    return out


def interaction(part: Interaction, x: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
    x = part.norm1(x + attention(part.self_attention, x, x, mask))
    x = part.norm2(x + attention(part.read, x, other, other_mask))
    first, _, second = part.feedforward
    return part.norm3(x + second(first(x).clamp(min=0)))


def snp(zoom: Zoom, x: Tensor) -> Tensor:
    """BatchNorm, then ReLU, of (B, C, h, w)."""
    norm = zoom.norm
    normed = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    return (normed * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def random_norm(zoom: Zoom) -> Zoom:
    nn.init.normal_(zoom.norm.running_mean)
    nn.init.uniform_(zoom.norm.running_var, 0.5, 2)
    nn.init.normal_(zoom.norm.weight)
    return zoom


@pytest.mark.parametrize(("stride", "wanted"), [(8, 16), (16, 16), (4, 16)])
@pytest.mark.parametrize("size", [(4, 8), (5, 3), (1, 1)], ids=str)
def test_to_the_coarser_every_pixel_is_a_sum_over_its_square(stride: int, wanted: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    zoom, x = random_norm(made(Zoom(3, 4, stride, wanted))), noise(2, 3, *size)
    step = wanted // stride
    grid = tuple(-(-side // step) for side in size)
    found, read = zoom(x, grid), snp(zoom, x)
    expected = torch.zeros(2, 4, *grid, dtype=torch.float64)
    for row in range(size[0]):
        for column in range(size[1]):
            weight = zoom.conv.weight[:, :, row % step, column % step]
            expected[:, :, row // step, column // step] += read[:, :, row, column] @ weight.T
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("stride", "wanted"), [(32, 16), (64, 16)])
@pytest.mark.parametrize("size", [(4, 8), (5, 3), (1, 1)], ids=str)
def test_to_the_finer_every_pixel_reads_the_one_above_it(stride: int, wanted: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    step = stride // wanted
    zoom, x = random_norm(made(Zoom(3, 4, stride, wanted))), noise(2, 3, *(-(-side // step) for side in size))
    found, read = zoom(x, size), snp(zoom, x)
    assert found.shape == (2, 4, *size)
    for row in range(size[0]):
        for column in range(size[1]):
            expected = read[:, :, row // step, column // step] @ zoom.conv.weight[:, :, row % step, column % step]
            torch.testing.assert_close(found[:, :, row, column], expected)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_stage_is_the_formulas(stride: int) -> None:
    torch.manual_seed(0)
    follows = stride > 8
    stage = made(BridgeStage(CONFIG, 6, 10, stride, 16, follows=follows))
    size = {8: (5, 3), 16: (3, 2), 32: (2, 1)}[stride]
    x, words, grid = noise(2, *size, 6), noise(2, 5, 10), (3, 2)
    before = Pair(noise(2, 6, WIDTH), noise(2, 5, WIDTH), grid) if follows else None
    map_, features, pair = stage(x, words, MASK, before)
    v = stage.pixel_in(x.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).reshape(2, 6, WIDTH)
    t = stage.word_in(words)
    if before is not None:
        v, t = stage.pixel_norm(v + before.pixels), stage.word_norm(t + before.words)
    torch.testing.assert_close(pair.pixels, v)
    torch.testing.assert_close(pair.words, t)
    assert pair.size == grid
    seen = interaction(stage.pixels, v, t, None, MASK).reshape(2, 3, 2, WIDTH).permute(0, 3, 1, 2)
    read = interaction(stage.words, t, v, MASK, None)
    torch.testing.assert_close(map_, x + stage.pixel_out(seen, size).permute(0, 2, 3, 1))
    torch.testing.assert_close(features[MASK], (words + stage.word_out(read))[MASK])


def test_the_gate_of_the_words() -> None:
    torch.manual_seed(0)
    gate, words = made(LanguageGate(10, 4)), noise(2, 5, 10)
    inner = torch.einsum("btd,cd->btc", words, gate.first.weight)
    inner = torch.where(inner > 0, inner, inner.exp() - 1)
    expected = words * (1 + 1 / (1 + (-torch.einsum("btc,dc->btd", inner, gate.second.weight)).exp()))
    torch.testing.assert_close(gate(words), expected)


def test_the_last_exchange_goes_both_ways() -> None:
    torch.manual_seed(0)
    last, x, words = made(LastExchange(6, 10, 7)), noise(2, 3, 4, 6), noise(2, 5, 10)
    map_, features = last(x, words, MASK)
    for b in range(2):
        kept = words[b][MASK[b]]
        a, t = last.pixel_in(x[b].reshape(12, 6)), last.word_in(kept)
        a, t = a / a.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
        image = []
        for linear in (last.image_query, last.image_key, last.image_value):
            y = linear(a)
            y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
            image.append(y.clamp(min=0))
        text = [linear(t).clamp(min=0) for linear in (last.text_query, last.text_key, last.text_value)]
        to_pixels = (image[0] @ text[1].T / math.sqrt(7)).softmax(1) @ text[2]
        to_words = (text[0] @ image[1].T / math.sqrt(7)).softmax(1) @ image[2]
        torch.testing.assert_close(map_[b].reshape(12, 6), x[b].reshape(12, 6) + last.pixel_out(to_pixels))
        torch.testing.assert_close(features[b][MASK[b]], kept + last.word_out(to_words))


def test_the_stages_in_their_order() -> None:
    """Exchange, gate, next slice; after the last the final exchange, then the neck and the mean of the words."""
    model = build(PRESETS["nsnpris"])
    image, text = batch()
    fusion, encoder = model.fusion, model.image_encoder
    with torch.no_grad():
        features = model.encode(image, text)
        words, stream, maps, pair = model.text_encoder.start(text), encoder.start(image), [], None
        for i in range(3):
            x, words = encoder.stage(i, stream), model.text_encoder.advance(i, words)
            x, spoken, pair = fusion.stages[i](x, words.features, text.mask, pair)
            words = words._replace(features=fusion.gate(spoken))
            stream = encoder.descend(i, x)
            maps.append(x)
        coarse, spoken = fusion.last(maps[2], words.features, text.mask)
        words = models.Words(spoken, text.mask)
        expected = fusion.neck(*(one.permute(0, 3, 1, 2) for one in (*maps[:2], coarse)), words.sentence)
    torch.testing.assert_close(features.maps[0].permute(0, 3, 1, 2), expected)
    torch.testing.assert_close(features.words.sentence, words.sentence)
    assert features.words.pooled is None


@pytest.mark.parametrize("words", [1, 60])
def test_any_number_of_words(words: int) -> None:
    model = build(PRESETS["nsnpris"])
    image, _ = batch((33, 40))
    ids = torch.full((2, words), 7)
    with torch.no_grad():
        mask = model(image, models.Text(ids, torch.ones_like(ids, dtype=torch.bool))).mask
    assert mask.shape == (2, 9, 10) and mask.isfinite().all()


@pytest.mark.parametrize(
    "image", [TINY_SWIN, {"kind": "timm", "name": "resnet10t"}], ids=["in the stream", "beside it"]
)
def test_on_four_stages_and_bert(image: dict[str, Any]) -> None:
    """The first map goes by; BERT in slices runs beside all four."""
    small = {"width": 16, "num_heads": 2, "feedforward": 16, "joint_width": 24, "widths": (32, 64, 32)}
    head = {"layers": 1, "num_heads": 4, "feedforward": 64, "dropout": 0.0}
    torch.manual_seed(0)
    text = {**TINY_BERT, "schedule": "slices"}
    model = models.create("nsnpris_swin_b", image=image, text=text, fusion=small, head=head)
    everything(model(*batch())).backward()
    assert without_gradient(model) == []
    model.eval()
    open_gates(model)
    picture, (ids, mask) = batch((67, 45))
    more, filled = F.pad(mask, (0, 6)), F.pad(ids, (0, 6), value=7)
    short, long = model.predict(picture, ids, mask), model.predict(picture, filled, more)
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    assert short.shape == (2, 67, 45)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion__num_heads": 3}, "num_heads=3 does not divide width=32"),
        ({"image": TINY_SWIN}, "text.schedule='slices' has a slice for each of 3 stages; the image encoder has 4"),
        ({"text__num_layers": 4}, "num_layers=4 must be a multiple of 3"),
        (
            {"image": {"kind": "timm", "name": "test_vit", "arguments": {"img_size": 64}}},
            r"fusion: bridge joins 3 maps.*strides are \(16, 16, 16\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config("nsnpris_tiny", **changes)
