"""TV-Net's parts: enrichment by another image, and the mix with the finest map, around any fusion and head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import models
from magnet_fast.data.tokenizers import Tokenizer
from magnet_fast.inference import Segmenter
from magnet_fast.models import Text
from magnet_fast.models.base import ReferringModel
from magnet_fast.models.fusion.enrich import Enrichment
from magnet_fast.models.fusion.exchange import averaged
from magnet_fast.models.heads.topdown import TopDownConfig
from magnet_fast.models.sizes import TINY_BERT, TINY_SWIN
from tests.models.cases import batch, everything, open_gates, without_gradient

SWIN = {**TINY_SWIN, "depths": (1, 1, 1, 1)}


def build(gates: bool = True, **changes: Any) -> ReferringModel:
    torch.manual_seed(0)
    model = models.create("tvnet_tiny", **changes).eval()
    if gates:
        open_gates(model)
    return model


def reference(count: int = 2, size: tuple[int, int] = (64, 64)) -> dict[str, Tensor]:
    return {"reference_image": torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(9))}


def test_enrichment_is_the_formulas() -> None:
    torch.manual_seed(0)
    part = Enrichment(6).double()
    torch.nn.init.normal_(part.gate.last.weight)
    x, other = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 9, 6).double()
    found = part(x, other, torch.tensor([True, False]))
    assert torch.equal(found[1], x[1])
    for row in range(3):
        for column in range(4):
            pixel = x[0, row, column]
            scores = torch.stack([part.query(pixel) @ part.key(one) for one in other[0]]) / math.sqrt(6)
            read = (scores.softmax(0)[:, None] * part.value(other[0])).sum(0)
            opened = torch.tanh(part.gate.last.weight @ (part.gate.first.weight @ read).clamp(min=0))
            torch.testing.assert_close(found[0, row, column], pixel + opened * read)


def test_maps_of_stride_8_and_coarser_meet_those_of_the_other_image() -> None:
    """By the same encoder without words, averaged to the grid; what comes out goes to the inner fusion."""
    model, context = build(), reference()
    image, text = batch()
    fusion, encoder = model.fusion, model.image_encoder
    with torch.no_grad():
        found = model.encode(image, text, context).maps
        others = model.maps(context["reference_image"])
        words, stream = model.text_encoder.start(text), encoder.start(image)
        for i in range(4):
            x = encoder.stage(i, stream)
            if i:
                x = fusion.stages[str(i)](x, averaged(others[i], 12), torch.ones(2, dtype=torch.bool))
            output, onward = fusion.inner.stages[i](x, words.features, text.mask)
            torch.testing.assert_close(found[i], output)
            if i < 3:
                stream = encoder.descend(i, onward)


def test_without_a_reference_the_inner_fusion_works_alone() -> None:
    model = build()
    image, text = batch()
    alone = models.create("tvnet_tiny", fusion={"kind": "pwam"}).eval()
    of_inner = {n: t for n, t in model.state_dict().items() if not n.startswith("fusion.stages.")}
    alone.load_state_dict({name.replace("fusion.inner.", "fusion."): tensor for name, tensor in of_inner.items()})
    zeros = {"reference_image": torch.zeros(2, 3, 48, 48)}
    mixed = {"reference_image": torch.cat([reference(1)["reference_image"], torch.zeros(1, 3, 64, 64)])}
    with torch.no_grad():
        expected, absent = alone(image, text).mask, model(image, text).mask
        blank, enriched = model(image, text, zeros).mask, model(image, text, mixed).mask
    assert torch.equal(absent, expected)
    torch.testing.assert_close(blank, expected)
    torch.testing.assert_close(enriched[1], expected[1])
    assert (enriched[0] - expected[0]).abs().max() > 1e-3


def test_the_mix_is_the_formulas() -> None:
    model = build()
    image, text = batch((67, 45))
    head = model.head
    with torch.no_grad():
        features = model.encode(image, text, reference())
        prediction = head(features)
        finest, *maps = features.maps
        inner = head.inner(features._replace(maps=maps, tokens=features.tokens[1:]))
        fine = torch.einsum("bhwc,dc->bdhw", finest, head.fine.weight[:, :, 0, 0]) + head.fine.bias[:, None, None]
        found = F.interpolate(inner.pixels, size=(17, 12), mode="bilinear", align_corners=False)
        gate = 1 / (1 + (-head.gate(torch.cat([found, fine], dim=1))).exp())
        pixels = head.smooth(gate * found + (1 - gate) * fine).clamp(min=0)
        mask = torch.einsum("bchw,c->bhw", pixels, head.classify.weight[0, :, 0, 0]) + head.classify.bias
    torch.testing.assert_close(prediction.mask, mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.pixels, pixels, rtol=1e-4, atol=1e-5)
    (before,) = prediction.earlier
    assert torch.equal(before.mask, inner.mask) and before.mask.shape == (2, 9, 6) and before.earlier == ()
    assert prediction.mask.shape == (2, 17, 12) and not prediction.aligned_corners


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion__inner": {"kind": "exchange", "pyramid": (2,)}, "text": {**TINY_BERT, "schedule": "slices"}},
        {"fusion__inner": {"kind": "tokens", "head_dim": 16}, "head__inner": {"kind": "fpn", "width": 32, "layers": 1}},
        {"head__inner": {"kind": "regions", "width": 32, "layers": 1}, "image": SWIN},
        {"image": {"kind": "timm", "name": "resnet10t"}},
    ],
    ids=["pwam", "exchange", "tokens", "regions", "beside the encoder"],
)
def test_around_any_fusion_and_head(changes: dict[str, Any]) -> None:
    """Every parameter learns from the first step on, closed gates and all; odd sizes; padded words change nothing."""
    torch.manual_seed(0)
    model = models.create("tvnet_tiny", **changes)
    everything(model(*batch(), reference())).backward()
    assert without_gradient(model) == []
    model.eval()
    open_gates(model)
    image, (ids, mask) = batch((33, 45))
    more, filled = F.pad(mask, (0, 6)), F.pad(ids, (0, 6), value=7)
    with torch.no_grad():
        short = model(image, Text(ids, mask), reference())
        long = model(image, Text(filled, more), reference())
    assert short.mask.shape == (2, 9, 12) and len(short.earlier) >= 1
    assert short.pixels.shape[1] == model.head.pixel_channels == model.config.head.pixel_channels(model.config.shapes)
    assert model.head.says_presence == model.config.head.says_presence == (short.presence is not None)
    if model.config.head.inner.kind != "regions":  # ReLA reads padding, as released
        torch.testing.assert_close(short.mask, long.mask, rtol=1e-4, atol=1e-4)


def test_data_must_offer_it_and_a_segmenter_goes_without() -> None:
    model = build(input__size=64)
    assert model.needs == ("reference_image",) and model.required == ()
    found = Segmenter(model, Tokenizer(max_tokens=12))(torch.zeros(50, 60, 3, dtype=torch.uint8).numpy(), "a circle")
    assert found.mask.shape == (50, 60)
    image, text = batch()
    with pytest.raises(ValueError, match=r"context\['reference_image'\] is \(3, 64, 64\) of torch.float32; expected"):
        model(image, text, {"reference_image": torch.zeros(3, 64, 64)})


def test_saved_and_loaded(tmp_path) -> None:
    model = build()
    models.save(model, tmp_path / "model.safetensors")
    again = models.load(tmp_path / "model.safetensors")
    image, text = batch()
    with torch.no_grad():
        assert torch.equal(again(image, text, reference()).mask, model(image, text, reference()).mask)
    assert again.config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__inner": {"kind": "pixel"}}, "pixel reads one map; this fusion gives 3"),
        (
            {"image": {"kind": "timm", "name": "test_vit", "arguments": {"img_size": 64}}},
            r"amf wants one map finer than all others; their strides are \(16, 16, 16\)",
        ),
        ({"fusion__inner": {"kind": "neck"}}, "neck joins 3 maps; the image encoder has 4"),
        ({"fusion__inner": {"kind": "necks"}}, "no fusion part 'necks'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.preset_config("tvnet_tiny", **changes)


def test_a_head_without_the_map_below_its_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopDownConfig, "pixel_channels", lambda self, shapes: None)
    with pytest.raises(ValueError, match="head.inner: amf mixes the map below the mask.*'topdown' has none"):
        models.preset_config("tvnet_tiny", head__inner={"kind": "topdown"})
