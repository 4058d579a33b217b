"""A mask as the product of one query and every pixel: for fusions that make a query of the sentence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction


@part
class QueryMaskConfig(HeadConfig):
    """One map and one token beside it."""

    kind: Literal["query_mask"] = "query_mask"

    def pixel_channels(self, shapes: Shapes) -> int:
        return shapes.channels[0]

    def check(self, shapes: Shapes) -> None:
        if len(shapes.channels) != 1 or shapes.tokens[0] is None:
            raise ValueError(
                f"head: query_mask reads one map with a token beside it; this fusion gives {len(shapes.channels)} and "
                f"tokens of {shapes.tokens} channels"
            )

    def build(self, shapes: Shapes) -> QueryMask:
        return QueryMask(shapes)


class QueryMask(Head):
    """The mask has the map's size; `pixels` is the map. Of the tokens the last one is the query."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        (self.pixel_channels,), (given,) = shapes.channels, shapes.tokens
        self.query = nn.Linear(given, self.pixel_channels)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: Features) -> Prediction:
        (x,), (tokens,) = features.maps, features.tokens
        query = self.query(tokens[:, -1]) * self.pixel_channels**-0.5
        mask = torch.einsum("bhwc,bc->bhw", x, query) + self.bias
        return Prediction(mask, pixels=x.permute(0, 3, 1, 2), words=features.words, aligned_corners=False)
