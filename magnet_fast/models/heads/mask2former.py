"""MagNet's head: Mask2Former's pixel decoder, and its mask decoder with one query (Cheng et al., CVPR 2022)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from magnet_fast.models.base import Head
from magnet_fast.models.config import Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.heads.mask_decoder import MaskDecoder
from magnet_fast.models.heads.pixel_decoder import PixelDecoder, PixelDecoderConfig


@part
class Mask2FormerConfig(PixelDecoderConfig):
    """Sizes of both decoders."""

    says_presence: ClassVar[bool] = True

    kind: Literal["mask2former"] = "mask2former"
    pixel_layers: int = Field(4, gt=0)
    pixel_feedforward: int = Field(1024, gt=0)
    mask_layers: int = Field(9, gt=0)
    mask_feedforward: int = Field(2048, gt=0)

    def build(self, shapes: Shapes) -> Mask2Former:
        return Mask2Former(shapes.channels, self)


class Mask2Former(Head):
    """All maps mixed by deformable attention, then a query that reads them inside its own previous mask.

    The class of the query, "it is the referent", is the presence; it weighs the mask.
    """

    says_presence = Mask2FormerConfig.says_presence

    def __init__(self, channels: tuple[int, ...], config: Mask2FormerConfig) -> None:
        super().__init__()
        self.pixel_channels = config.width
        self.pixel_decoder = PixelDecoder(
            channels,
            width=config.width,
            num_heads=config.num_heads,
            points=config.points,
            layers=config.pixel_layers,
            feedforward=config.pixel_feedforward,
        )
        self.mask_decoder = MaskDecoder(
            levels=len(channels),
            width=config.width,
            num_heads=config.num_heads,
            layers=config.mask_layers,
            feedforward=config.mask_feedforward,
        )

    def forward(self, features: Features) -> Prediction:
        levels, mask_features = self.pixel_decoder(features.maps)
        *earlier, (mask, presence) = self.mask_decoder(levels, mask_features)
        return Prediction(
            mask,
            presence,
            tuple(Prediction(mask, presence, presence_weighs=True) for mask, presence in earlier),
            pixels=mask_features,
            words=features.words,
            presence_weighs=True,
        )
