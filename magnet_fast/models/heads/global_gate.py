"""A head that first asks the whole picture: what the sentence finds in the coarsest map gates the channels of all maps.

In the style of two-stage multi-modal interaction, of which only an abstract is public: its second stage, a global
alignment, localises the whole object. Form, widths and the head behind it are our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from magnet_fast.models.attention import SentenceRead
from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction, changed
from magnet_fast.models.heads.topdown import TopDown

PIXELS, SENTENCE = "global_pixels", "global_sentence"
"""Names in `Prediction.extra` of what the gate compares, (B, d) each: the term `global_alignment` reads them."""


@part
class GlobalGateConfig(HeadConfig):
    """Maps of one width, gated by sentence and picture as wholes, then LAVT's convolutions."""

    kind: Literal["global_gate"] = "global_gate"
    width: int = Field(256, gt=0, description="channels of the maps, of the gate and of the convolutions")

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.width

    def build(self, shapes: Shapes) -> GlobalGate:
        return GlobalGate(shapes, self.width)


class GlobalGate(Head):
    """Every map is projected to d channels and multiplied by 1 + g, g between 0 and 1 for each channel.

    v = sum_p softmax_p((W_q s) . (W_k x_p) / sqrt(d)) W_v x_p        over the coarsest map, which is the last
    g = sigmoid(W_2 ReLU(W_1 [v; W_t s]))
    """

    def __init__(self, shapes: Shapes, width: int) -> None:
        super().__init__()
        self.pixel_channels = width
        self.find = SentenceRead(shapes.channels[-1], shapes.sentence_width, width)
        self.sentence = nn.Linear(shapes.sentence_width, width)
        self.gate = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.Sigmoid())
        self.projections = nn.ModuleList(nn.Linear(channels, width) for channels in shapes.channels)
        self.topdown = TopDown((width,) * len(shapes.channels), width)

    def forward(self, features: Features) -> Prediction:
        seen, said = self.find(features.maps[-1], features.words.sentence), self.sentence(features.words.sentence)
        gate = 1 + self.gate(torch.cat([seen, said], dim=-1))[:, None, None]
        maps = [projection(x) * gate for projection, x in zip(self.projections, features.maps, strict=True)]
        prediction = self.topdown(features._replace(maps=maps))
        return changed(prediction, extra={PIXELS: seen, SENTENCE: said})
