"""Superpixels as tokens: the parts against their formulas in float64, and the model's contract with its context."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magnet_fast import models
from magnet_fast.models import Features, Text, Words
from magnet_fast.models.config import Shapes
from magnet_fast.models.fusion.superpixel import Aggregator, geometry, members, written
from magnet_fast.models.heads.query_mask import QueryMaskConfig
from tests.models.cases import batch, build, everything, open_gates, without_gradient
from tests.models.plain_forms import linear, randomised

CASE = ("superpixel_tiny", {})
SIZES = [(64, 96), (67, 45), (32, 33)]


def context(image: Tensor, labels: int = 9) -> dict[str, Tensor]:
    """Blocks of labels, some of which belong to no superpixel."""
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, labels, (len(image), 1, 4, 5), generator=generator).float()
    found = F.interpolate(blocks, image.shape[2:], mode="nearest")[:, 0].to(torch.uint8)
    found[:, :5] = 255
    return {"superpixels": found}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_contract(size: tuple[int, int]) -> None:
    model = build(CASE)
    image, text = batch(size)
    with torch.inference_mode():
        prediction = model(image, text, context(image))
        features = model.encode(image, text, context(image))
    quarter = tuple(-(-side // 4) for side in size)
    assert prediction.mask.shape == (2, *quarter) and prediction.pixels.shape == (2, 64, *quarter)
    assert prediction.presence is None and model.needs == model.required == ("superpixels",)
    assert features.tokens[0].shape == (2, 1, 64) and model.config.shapes.tokens == (64,)
    with pytest.raises(ValueError, match="context lacks superpixels, which this model needs"):
        model(image, text)


@pytest.mark.parametrize("image", [{}, {"kind": "timm", "name": "tf_efficientnet_lite0"}], ids=["swin", "timm"])
def test_every_parameter_learns(image: dict) -> None:
    model = build(("superpixel_tiny", {"image": image} if image else {})).train()
    inputs = batch()
    everything(model(*inputs, context(inputs[0]))).backward()
    assert without_gradient(model) == []
    model.zero_grad()
    open_gates(model)
    everything(model(*inputs, context(inputs[0]))).backward()
    dead = [n for n, p in model.named_parameters() if not p.grad.any() and ".key.bias" not in n]
    # A superpixel's softmax is blind to what is added to all of its scores.
    assert [n for n in dead if n != "fusion.aggregate.salience.bias"] == []


def test_padding_and_neighbours_in_a_batch_are_never_seen() -> None:
    model = build(CASE)
    image, (ids, mask) = batch()
    beside = context(image)
    with torch.no_grad():
        found = model(image, Text(ids, mask), beside).mask
        more = Text(F.pad(ids, (0, 6), value=7), F.pad(mask, (0, 6)))
        torch.testing.assert_close(model(image, more, beside).mask, found, rtol=1e-4, atol=1e-5)
        one = model(image[1:], Text(ids[1:], mask[1:]), {"superpixels": beside["superpixels"][1:]}).mask
        torch.testing.assert_close(one, found[1:], rtol=1e-4, atol=1e-5)
        # Labels are names: others for the same regions change nothing, nor does a map of labels in larger pixels.
        renamed = {"superpixels": (beside["superpixels"].long() * 5 + 3) % 256}
        torch.testing.assert_close(model(image, Text(ids, mask), renamed).mask, found, rtol=1e-4, atol=1e-5)
        shared = model(image, Text(ids, mask), beside, seen=model.look(image)).mask
        torch.testing.assert_close(shared, found)
        other = {"superpixels": beside["superpixels"].flip(2)}
        assert (model(image, Text(ids, mask), other).mask - found).abs().max() > 1e-4


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "weights"])
def test_bfloat16_is_near(whole: bool) -> None:
    model = build(CASE)
    image, text = batch()
    with torch.no_grad():
        exact = model(image, text, context(image)).mask
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not whole):
            found = (model.bfloat16() if whole else model)(image, text, context(image)).mask
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (9, 5)])
def test_aggregator_and_members_are_their_formulas(size: tuple[int, int]) -> None:
    labels = context(torch.zeros(2, 3, 17, 13))["superpixels"]
    inside = members(labels, 6, size)
    aggregate = randomised(Aggregator(4))
    x = torch.randn(2, size[0] * size[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = aggregate(x, inside.flatten(2))
    for b in range(2):
        pixels: dict[int, list[Tensor]] = {k: [] for k in range(6)}
        for row in range(size[0]):
            for column in range(size[1]):
                label = int(labels[b, int((row + 0.5) * 17 / size[0]), int((column + 0.5) * 13 / size[1])])
                for k in range(6):
                    assert inside[b, k, row, column] == (label == k)
                if label < 6:
                    pixels[label].append(x[b, row * size[1] + column])
        for k, own in pixels.items():
            mean = detail = torch.zeros(4, dtype=torch.float64)
            if own:
                mean = sum(own) / len(own)
                weights = torch.stack([linear(pixel, aggregate.salience)[0] for pixel in own]).softmax(0)
                detail = sum(weight * pixel for weight, pixel in zip(weights, own, strict=True))
            expected = linear(torch.cat([mean, detail, x[b].mean(0)]), aggregate.output)
            torch.testing.assert_close(found[b, k], expected)


def test_geometry_is_that_of_its_pixels() -> None:
    inside = torch.zeros(1, 3, 6, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    inside[0, 0] = torch.rand(6, 8, generator=generator) > 0.5
    inside[0, 1, 2:4, 1:7] = 1
    found = geometry(inside)
    for k in range(2):
        rows, columns = inside[0, k].nonzero(as_tuple=True)
        y, x = (rows + 0.5) / 6, (columns + 0.5) / 8
        expected = [x.mean(), y.mean(), len(set(columns.tolist())) / 8, len(set(rows.tolist())) / 6]
        expected += [
            x.var(unbiased=False),
            y.var(unbiased=False),
            ((x - x.mean()) * (y - y.mean())).mean(),
            len(x) / 48,
        ]
        torch.testing.assert_close(found[0, k].float(), torch.tensor(expected).float())
    assert not found[0, 2].any()
    waves = written(found)
    angles = [float(number) * math.pi * 2**octave for number in found[0, 0] for octave in range(4)]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    torch.testing.assert_close(waves[0, 0], expected)


def test_a_pixel_is_sharpened_by_its_superpixel() -> None:
    """The head's product of query and pixel is that with the pixel's own feature and that with its superpixel's."""
    model = build(CASE).double()
    image, text = batch()
    image, labels = image.double(), context(image)["superpixels"]
    seen: list[Tensor] = []
    model.fusion.token_norm.register_forward_hook(lambda _, __, result: seen.append(result))
    with torch.no_grad():
        prediction = model(image, text, {"superpixels": labels})
        _, pixels = model.look(image)
    query = linear(seen[0][:, -1], model.head.query) / 8
    gathered = members(labels, 64, (4, 6)).flatten(2).any(2)  # of the map of stride 16
    for b, row, column in [(0, 3, 4), (1, 9, 20), (1, 0, 0)]:
        label = int(labels[b, int((row + 0.5) * 4), int((column + 0.5) * 4)])
        expected = query[b] @ pixels[b, row, column] + model.head.bias
        if label < 64 and gathered[b, label]:
            expected = expected + query[b] @ seen[0][b, label]
        torch.testing.assert_close(prediction.mask[b, row, column], expected)


@pytest.mark.parametrize("labels", [torch.zeros(2, 64, 96), torch.zeros(64, 96).long(), torch.zeros(1, 64, 96).long()])
def test_refused_labels(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"context\['superpixels'\] is .*; expected integers \(B, H, W\)"):
        build(CASE)(*batch(), {"superpixels": labels})


def test_refused_parts() -> None:
    with pytest.raises(ValueError, match="num_heads=5 does not divide width=64"):
        models.preset_config("superpixel_tiny", fusion__num_heads=5)
    with pytest.raises(ValueError, match="query_mask reads one map with a token beside it; this fusion gives 4"):
        models.preset_config("lavt_tiny", head={"kind": "query_mask"})


def test_query_mask_takes_the_last_token() -> None:
    shapes = Shapes((4,), (4,), 6, 6, (3,))
    head = randomised(QueryMaskConfig().build(shapes))
    x, tokens = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    words = Words(torch.zeros(2, 1, 6), torch.ones(2, 1, dtype=torch.bool))
    found = head(Features([x], words, [tokens], (12, 20))).mask
    for b in range(2):
        expected = x[b] @ linear(tokens[b, 1], head.query) / 2 + head.bias
        torch.testing.assert_close(found[b], expected)
