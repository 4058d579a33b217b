"""TV-Net's adaptive mix with the finest map, around any head: what is found at stride 8 is drawn at stride 4.

In the style of TV-Net (ACM MM 2021), of which an abstract and a figure are public. Stated: the fused map is joined with
that of the first stage, then enlarged. The gate between them and the widths are our choice.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import SerializeAsAny
from torch import nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part, read_part
from magnet_fast.models.contract import Features, Prediction, changed


@part
class AMFConfig(HeadConfig):
    """Another head, `inner`, on all maps but the finest."""

    kind: Literal["amf"] = "amf"
    inner: Annotated[SerializeAsAny[HeadConfig], read_part("head")]

    @property
    def says_presence(self) -> bool:
        return self.inner.says_presence

    def pixel_channels(self, shapes: Shapes) -> int | None:
        return self.inner.pixel_channels(_coarser(shapes))

    def check(self, shapes: Shapes) -> None:
        if len(shapes.channels) < 2 or shapes.strides[0] >= shapes.strides[1]:
            raise ValueError(f"head: amf wants one map finer than all others; their strides are {shapes.strides}")
        self.inner.check(_coarser(shapes))
        if self.inner.pixel_channels(_coarser(shapes)) is None:
            raise ValueError(f"head.inner: amf mixes the map below the mask, and the head {self.inner.kind!r} has none")

    def build(self, shapes: Shapes) -> AMF:
        return AMF(self, shapes)


class AMF(Head):
    """M' = g ⊙ M + (1 - g) ⊙ X, with M the inner head's pixels enlarged, X the finest map and g a gate of both.

    The mask has the finest map's size; the inner head's prediction is the last of the earlier ones.
    """

    def __init__(self, config: AMFConfig, shapes: Shapes) -> None:
        super().__init__()
        inner = _coarser(shapes)
        width = config.inner.pixel_channels(inner)
        self.inner: Head = config.inner.build(inner)
        self.pixel_channels, self.says_presence = width, config.says_presence
        self.sentence_width = self.inner.sentence_width
        self.fine = nn.Conv2d(shapes.channels[0], width, 1)
        self.gate = nn.Conv2d(2 * width, width, 3, padding=1)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.classify = nn.Conv2d(width, 1, 1)

    def forward(self, features: Features) -> Prediction:
        finest, *maps = features.maps
        before = self.inner(features._replace(maps=maps, tokens=features.tokens[1:]))
        fine = self.fine(finest.permute(0, 3, 1, 2))
        found = F.interpolate(before.pixels, size=fine.shape[2:], mode="bilinear", align_corners=False)
        gate = self.gate(torch.cat([found, fine], dim=1)).sigmoid()
        pixels = F.relu(self.smooth(gate * found + (1 - gate) * fine))
        mask = self.classify(pixels)[:, 0]
        earlier = (*before.earlier, changed(before, earlier=()))
        return changed(before, mask=mask, pixels=pixels, earlier=earlier, aligned_corners=False)


def _coarser(shapes: Shapes) -> Shapes:
    return shapes._replace(channels=shapes.channels[1:], strides=shapes.strides[1:], tokens=shapes.tokens[1:])
