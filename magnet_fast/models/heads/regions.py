"""ReLA's head: a grid of regions reads pixels and words, and a mask is their weighted sum (Liu et al., CVPR 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.base import Head
from magnet_fast.models.config import Shapes, part
from magnet_fast.models.contract import Features, Prediction, Words
from magnet_fast.models.heads.fpn import check_levels
from magnet_fast.models.heads.mask_decoder import QueryAttention, inside_mask
from magnet_fast.models.heads.pixel_decoder import Level, PixelDecoderConfig, PyramidPixelDecoder
from magnet_fast.models.position import sine_position

_LANGUAGE_SHARE = 0.1  # of what the regions take up of the words, before the gate


@part
class RegionsConfig(PixelDecoderConfig):
    """Sizes of pixel decoder and region decoder."""

    says_presence: ClassVar[bool] = True

    kind: Literal["regions"] = "regions"
    side: int = Field(10, gt=0, description="regions along each side of the grid")
    pixel_layers: int = Field(6, gt=0)
    pixel_feedforward: int = Field(1024, gt=0)
    layers: int = Field(9, gt=0)
    feedforward: int = Field(2048, gt=0)
    language_gate: Literal["trained", "released"] = Field(
        "trained", description="how much of the words regions take up is learnt, or one half, as released files are run"
    )

    def check(self, shapes: Shapes) -> None:
        check_levels(shapes)

    def build(self, shapes: Shapes) -> Regions:
        return Regions(shapes, self)


class Regions(Head):
    """The mask has the finest map's size; `extra["minimap"]` (B, side, side) are logits of the regions themselves.

    Presence is the mean of what the regions say. Logits are to be resized without aligned corners.
    """

    says_presence = RegionsConfig.says_presence

    def __init__(self, shapes: Shapes, config: RegionsConfig) -> None:
        super().__init__()
        self.pixel_channels = config.width
        self.pixel_decoder = PyramidPixelDecoder(
            shapes.channels,
            width=config.width,
            num_heads=config.num_heads,
            points=config.points,
            layers=config.pixel_layers,
            feedforward=config.pixel_feedforward,
        )
        self.decoder = RegionDecoder(len(shapes.channels) - 1, shapes.text_width, config)

    def forward(self, features: Features) -> Prediction:
        levels, pixels = self.pixel_decoder(features.maps)
        mask, minimap, presence = self.decoder(levels, pixels, features.words)
        return Prediction(
            mask,
            presence,
            pixels=pixels,
            words=features.words,
            extra={"minimap": minimap},
            aligned_corners=False,
        )


class RegionDecoder(nn.Module):
    """Regions that read pixels, words once, and one another; a region reads pixels inside its own previous mask only.

    Args:
        levels: of the pyramid that is read in turn.
        text_width: D of the words.
        config: sizes.
    """

    def __init__(self, levels: int, text_width: int, config: RegionsConfig) -> None:
        super().__init__()
        width, count = config.width, config.side**2
        self.side = config.side
        self.query_feature = nn.Parameter(torch.randn(count, width))
        self.query_embed = nn.Parameter(torch.randn(count, width))
        self.level_embed = nn.Parameter(torch.randn(levels, width))
        self.word_in = nn.Linear(text_width, width, bias=False)
        nn.init.zeros_(self.word_in.weight)
        self.word_attention = QueryAttention(width, config.num_heads)
        # A sigmoid gate. Released code never loads it: its files are evaluated with 0, whatever they hold.
        self.language_gate = nn.Parameter(torch.zeros(())) if config.language_gate == "trained" else None
        self.pixel_attention = nn.ModuleList(QueryAttention(width, config.num_heads) for _ in range(config.layers))
        self.layers = nn.ModuleList(
            RegionLayer(width, config.num_heads, config.feedforward) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.minimap_head = nn.Linear(width, 2)  # background, target
        self.presence_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))  # something, none

    def forward(self, levels: list[Level], mask_features: Tensor, words: Words) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, the coarsest first, mask features (B, C, h, w) and words to mask logits (B, h, w), minimap logits
        (B, side, side) and presence logits (B,)."""
        batch = mask_features.shape[0]
        memories, keys, resized = [], [], []
        for (tokens, shape), embed in zip(levels, self.level_embed, strict=True):
            memories.append(tokens + embed)
            keys.append(memories[-1] + sine_position(*shape, tokens.shape[2], tokens.device, tokens.dtype))
            # Resizing is linear, so it may come before the product with the regions.
            small = F.interpolate(mask_features.detach(), size=shape, mode="bilinear", align_corners=False)
            resized.append(small.flatten(2))
        x = self.query_feature.expand(batch, -1, -1)
        place = self.query_embed.expand(batch, -1, -1)
        for index, (attend, layer) in enumerate(zip(self.pixel_attention, self.layers, strict=True)):
            level = index % len(levels)
            allowed = inside_mask(self.mask_head(self.norm(x)).detach(), resized[level])
            x = attend(x, x + place, keys[level], memories[level], allowed)
            if index == 0:
                x = x + self.listen(x, words)
            x = layer(x, place)
        return self.answer(self.norm(x), mask_features)

    def listen(self, x: Tensor, words: Words) -> Tensor:
        """What regions (B, P², C) take up of the words. All positions are read, padding too, as released."""
        read = self.word_in(words.features)
        gate = 0.5 if self.language_gate is None else self.language_gate.sigmoid()
        return _LANGUAGE_SHARE * gate * self.word_attention(x, x, read, read)

    def answer(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Regions (B, P², C), normed, to what `forward` returns."""
        minimap = self.minimap_head(x)  # (B, P², 2)
        # Each region's mask is its embedding times the features; a mask sums them up with the minimap's weights.
        kernels = minimap.transpose(1, 2) @ self.mask_head(x)  # (B, 2, C)
        background, target = torch.einsum("bac,bchw->bahw", kernels, mask_features).unbind(dim=1)
        something, none = self.presence_head(x).mean(dim=1).unbind(dim=-1)
        cells = (minimap[..., 1] - minimap[..., 0]).unflatten(1, (self.side, self.side))
        return target - background, cells, something - none


class RegionLayer(nn.Module):
    """Attention among regions and a feed-forward network, each post-norm."""

    is_repeated_layer = True

    def __init__(self, width: int, num_heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention = QueryAttention(width, num_heads)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """x, place (B, P², C)."""
        x = self.attention(x, x + place, x + place, x)
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))
