"""The ASPP block and the head made of it, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from magnet_fast import models
from magnet_fast.models import Features, Words
from magnet_fast.models.config import Shapes
from magnet_fast.models.heads.aspp import ASPP, AsppConfig
from tests.models.cases import without_gradient
from tests.models.plain_forms import conv_block, convolve, pooled, randomised, resize

WORDS = Words(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))


def features(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, count: int = 2) -> Features:
    """Maps of (height, width, channels)."""
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(count, *shape, generator=generator, dtype=dtype) for shape in shapes]
    return Features(maps, WORDS, [None] * len(maps), (64, 96))


def shapes(*channels: int) -> Shapes:
    return Shapes(channels, tuple(8 * 2**i for i in range(len(channels))), 4, 4, (None,) * len(channels))


@pytest.mark.parametrize("image_norm", ["layer", "batch"])
@pytest.mark.parametrize("size", [(9, 14), (1, 5), (3, 2)])
def test_block_is_its_formula(image_norm: str, size: tuple[int, int]) -> None:
    """Dilations that reach beyond the map read nothing but zeros there."""
    block = randomised(ASPP(6, 5, (1, 2, 12), image_norm=image_norm))
    assert [branch[0].kernel_size for branch in block.branches] == [(1, 1), (3, 3), (3, 3)]
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(block(x), pooled(x, block))


@pytest.mark.parametrize("config", [{}, {"lateral": 3}, {"enlarge": (4, 2)}])
def test_head_is_its_formula(config: dict[str, Any]) -> None:
    """Maps of one size, or of others, at the finest's; steps that double with aligned corners."""
    head = randomised(AsppConfig(width=6, dilations=(1, 2), **config).build(shapes(4, 3, 5)))
    given = features((5, 7, 4), (3, 4, 3), (3, 4, 5))
    maps = [x.permute(0, 3, 1, 2) for x in given.maps]
    if "lateral" in config:
        maps = [conv_block(x, conv) for x, conv in zip(maps, head.lateral, strict=True)]
    expected = pooled(torch.cat([resize(x, (5, 7)) for x in maps], dim=1), head.aspp)
    for conv in head.enlarge:
        expected = conv_block(expected, conv)
        expected = resize(expected, tuple(2 * side for side in expected.shape[2:]), aligned=True)
    found = head(given)
    torch.testing.assert_close(found.pixels, expected)
    torch.testing.assert_close(found.mask, convolve(expected, head.classify)[:, 0])
    assert found.pixels.shape[1] == head.pixel_channels == (2 if "enlarge" in config else 6)


def test_one_image_trains_unless_statistics_are_asked_for() -> None:
    one = features((5, 7, 4), dtype=torch.float32, count=1)
    head = AsppConfig(width=6).build(shapes(4)).train()
    head(one).mask.sum().backward()
    assert without_gradient(head) == []
    released = AsppConfig(width=6, image_norm="batch").build(shapes(4)).train()
    with pytest.raises(ValueError, match="image_norm='batch': a batch of one image .* expected two images or more"):
        released(one)
    released(features((5, 7, 4), dtype=torch.float32)).mask.sum().backward()
    assert without_gradient(released) == []
    released.aspp.image[2].eval()  # a norm that is held fixed takes no statistics
    assert released(one).mask.isfinite().all()


def test_mask_of_an_image_alone_is_the_same() -> None:
    """With the norm over channels a picture's mean says the same beside any other, in training, too."""
    block = randomised(ASPP(6, 5, (1,))).image.train()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x)[1:2], block(x[1:2]))


@pytest.mark.parametrize(
    "settings", [{"dilations": ()}, {"dilations": (1, 0)}, {"enlarge": (0,)}, {"image_norm": "group"}]
)
def test_refused_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"head\.{next(iter(settings))}"):
        models.preset_config("lavt_tiny", head={"kind": "aspp", **settings})
