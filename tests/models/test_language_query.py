"""CMT's head against its formulas, slow and in float64; strides that repeat; what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import models
from magnet_fast.models.config import Shapes
from magnet_fast.models.contract import Features, Words
from magnet_fast.models.heads.language_query import LanguageQuery, LanguageQueryConfig, middle_map
from magnet_fast.models.position import sine_position
from tests.models import slow
from tests.models.cases import batch, build, everything, without_gradient

HEADS = 2
SIZES = ((6, 7), (4, 3), (2, 3), (1, 2))
SHAPES = Shapes((5, 6, 7, 8), (4, 8, 16, 32), 10, 10, (None,) * 4)


def made(shapes: Shapes = SHAPES) -> LanguageQuery:
    torch.manual_seed(0)
    config = LanguageQueryConfig(width=8, num_heads=HEADS, layers=2, feedforward=12, max_words=5)
    head = config.build(shapes).double().eval()
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return head


def inputs(sizes: tuple[tuple[int, int], ...] = SIZES, channels: tuple[int, ...] = SHAPES.channels) -> Features:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = [noise(2, *size, c) for size, c in zip(sizes, channels, strict=True)]
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    return Features(maps, Words(noise(2, 4, 10), mask), [None] * len(maps), (24, 28))


def expected(head: LanguageQuery, features: Features, item: int) -> tuple[Tensor, Tensor]:
    """The earlier mask and the mask of one item."""
    maps, mask = [x[item] for x in features.maps], features.words.mask[item]

    def project(module: nn.Sequential, x: Tensor) -> Tensor:
        return slow.layer_norm(module[1], slow.linear(module[0], x))

    tokens = [
        project(head.pixel_in[i], maps[2 + i].flatten(0, 1))
        + sine_position(*maps[2 + i].shape[:2], 8, torch.device("cpu"), torch.float64)[0]
        for i in range(2)
    ]
    words = project(head.word_in, features.words.features[item]) + head.word_positions[: len(mask)]
    x = torch.cat([*tokens, words])
    read = torch.cat([torch.ones(len(x) - len(mask), dtype=torch.bool), mask])
    for layer in head.encoder:
        x = slow.pre_norm_layer(layer, HEADS, x, mask=read)
    x = slow.layer_norm(head.encoder_norm, x)
    pixels, queries = x[: -len(mask)], x[-len(mask) :]
    for layer in head.queries:
        queries = slow.pre_norm_layer(layer, HEADS, queries, pixels)
    queries, x = slow.layer_norm(head.query_norm, queries), pixels[: len(tokens[0])]
    for layer in head.decoder:
        x = slow.pre_norm_layer(layer, HEADS, x, queries, mask)
    x = slow.layer_norm(head.decoder_norm, x).unflatten(0, maps[2].shape[:2])
    earlier = slow.linear(head.classify_middle, x)[..., 0]
    for level in (1, 0):
        detail, size = head.details[level], maps[level].shape[:2]
        x = F.interpolate(x.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        weigh = 1 + 1 / (1 + (-slow.linear(detail.weigh, x)).exp())
        x = torch.cat([x, weigh * slow.linear(detail.lateral, maps[level])], dim=-1)
        convolution, norm, _ = detail.join
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        rows = [[padded[i : i + 3, j : j + 3] for j in range(size[1])] for i in range(size[0])]
        windows = torch.stack([torch.stack(row) for row in rows])  # (H, W, 3, 3, C)
        x = torch.einsum("hwijc,dcij->hwd", windows, convolution.weight)
        x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        x = x.clamp(min=0)
    return earlier, slow.linear(head.classify, x)[..., 0]


def test_formulas() -> None:
    head, features = made(), inputs()
    with torch.no_grad():
        prediction = head(features)
        for item in range(2):
            earlier, mask = expected(head, features, item)
            torch.testing.assert_close(prediction.earlier[0].mask[item], earlier)
            torch.testing.assert_close(prediction.mask[item], mask)
    assert prediction.pixels.shape == (2, 8, 6, 7) and not prediction.aligned_corners


def test_the_deepest_of_two_maps_of_one_stride_is_decoded() -> None:
    """A dilated encoder's last two maps have stride 16: both are read, the last is what the mask grows from."""
    assert middle_map((4, 8, 16, 16), "x") == 3 and middle_map((8, 16, 32, 32), "x") == 1
    head = made(SHAPES._replace(strides=(4, 8, 16, 16)))
    sizes = ((6, 7), (4, 3), (2, 3), (2, 3))
    features = inputs(sizes)
    with torch.no_grad():
        before = head(features).earlier[0].mask
        changed = features._replace(maps=[*features.maps[:2], features.maps[2] + 1, features.maps[3]])
        assert before.shape == (2, 2, 3) and not torch.equal(head(changed).earlier[0].mask, before)
    dilated = {"kind": "timm", "name": "resnet10t", "arguments": {"output_stride": 16}}
    model = build(("cmt_tiny", {"image": dilated}))
    assert model.image_encoder.strides == (4, 8, 16, 16)
    prediction = model.train()(*batch((67, 45)))
    assert prediction.mask.shape == (2, 17, 12) and prediction.earlier[0].mask.shape == (2, 5, 3)
    everything(prediction).backward()
    assert without_gradient(model) == []


def test_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=3 does not divide width=64"):
        models.preset_config("cmt_tiny", head__num_heads=3)
    with pytest.raises(ValueError, match=r"language_query reads a map of stride 16 or more, and finer ones.*\(16,"):
        models.preset_config("risam_tiny", fusion={"kind": "none"}, head={"kind": "language_query"})
    with pytest.raises(ValueError, match="text.ids holds 6 tokens; this head has 5 positions"):
        features = inputs()
        words = Words(torch.zeros(2, 6, 10).double(), torch.ones(2, 6, dtype=torch.bool))
        made()(features._replace(words=words))
