"""CMT's head: words look at the pixels and become queries that the pixels read (Zhang et al., Neurocomputing 2023).

In the style of Wenjing Zhang et al., "Cross-modal transformer with language query for referring image segmentation".
Only its abstract is public: a cross-modal encoder of both sides, a language-query encoder (LQ), a cross-modal decoder,
and semantics-guided detail enhancement (SDE). Layers, widths and formulas are our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.layers import trunc_normal_
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.attention import Attention, TokenAttention
from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.encoders.clip_resnet import conv_norm_relu
from magnet_fast.models.fusion.neck import enlarge
from magnet_fast.models.position import sine_position

COARSE = 16
"""Stride of the maps on which words and pixels meet, or more; finer ones give details."""


@part
class LanguageQueryConfig(HeadConfig):
    """Sizes of the transformer; the detail enhancement has the same width."""

    kind: Literal["language_query"] = "language_query"
    width: int = Field(256, gt=0, multiple_of=4)
    num_heads: int = Field(8, gt=0)
    layers: int = Field(2, gt=0, description="of the encoder, of the language queries, of the decoder: so many each")
    feedforward: int = Field(1024, gt=0)
    max_words: int = Field(77, gt=0, description="positions that words may have")

    @model_validator(mode="after")
    def _divisible(self) -> LanguageQueryConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def pixel_channels(self, shapes: Shapes) -> int:
        return self.width

    def check(self, shapes: Shapes) -> None:
        middle_map(shapes.strides, self.kind)

    def build(self, shapes: Shapes) -> LanguageQuery:
        return LanguageQuery(shapes, self)


class LanguageQuery(Head):
    """The mask has the finest map's size, `pixels` is the map below it; an earlier mask has the middle map's.

    The middle map is the deepest of the finest with a stride of at least 16. It and those as coarse or coarser go
    through the encoder; in the decoder, where pixels do not look at one another, it is alone.
    """

    def __init__(self, shapes: Shapes, config: LanguageQueryConfig) -> None:
        super().__init__()
        width = self.pixel_channels = config.width
        self.middle = middle_map(shapes.strides, config.kind)
        self.coarse = [i for i, stride in enumerate(shapes.strides) if stride >= COARSE]
        self.fine = [i for i, stride in enumerate(shapes.strides) if stride < COARSE]
        self.pixel_in = nn.ModuleList(_project(shapes.channels[i], width) for i in self.coarse)
        self.word_in = _project(shapes.text_width, width)
        self.word_positions = nn.Parameter(torch.empty(config.max_words, width))
        trunc_normal_(self.word_positions, std=0.02)

        def layers(attention: type[nn.Module], *settings: float) -> nn.ModuleList:
            made = (attention(width, config.num_heads, *settings) for _ in range(config.layers))
            return nn.ModuleList(Layer(one, width, config.feedforward) for one in made)

        self.encoder, self.encoder_norm = layers(SelfAttention, 0.0), nn.LayerNorm(width)
        self.queries, self.query_norm = layers(ReadPixels), nn.LayerNorm(width)
        self.decoder, self.decoder_norm = layers(TokenAttention), nn.LayerNorm(width)
        self.classify_middle = nn.Conv2d(width, 1, 1)
        self.details = nn.ModuleList(DetailEnhancement(shapes.channels[i], width) for i in self.fine)
        self.classify = nn.Conv2d(width, 1, 1)

    def forward(self, features: Features) -> Prediction:
        maps, words = features.maps, features.words
        pixels, queries = self.encode(maps, words.features, words.mask)
        for layer in self.queries:
            queries = layer(queries, pixels, words.mask)
        queries = self.query_norm(queries)
        counts = [maps[i].shape[1] * maps[i].shape[2] for i in self.coarse]
        x = pixels.split(counts, dim=1)[self.coarse.index(self.middle)]
        for layer in self.decoder:
            x = layer(x, queries, words.mask)
        x = self.decoder_norm(x).transpose(1, 2).unflatten(2, maps[self.middle].shape[1:3])  # (B, d, h, w)
        earlier = Prediction(self.classify_middle(x)[:, 0], aligned_corners=False)
        for i, detail in zip(reversed(self.fine), reversed(self.details), strict=True):
            x = detail(x, maps[i].permute(0, 3, 1, 2))
        mask = self.classify(x)[:, 0]
        return Prediction(mask, earlier=(earlier,), pixels=x, words=words, aligned_corners=False)

    def encode(self, maps: list[Tensor], words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, H, W, C) and words (B, T, D) with their mask to the pixels of all coarse maps (B, P, d) and to words
        (B, T, d), each having read all."""
        count = words.shape[1]
        if count > len(self.word_positions):
            raise ValueError(f"text.ids holds {count} tokens; this head has {len(self.word_positions)} positions")
        tokens = []
        for i, project in zip(self.coarse, self.pixel_in, strict=True):
            x = project(maps[i].flatten(1, 2))
            tokens.append(x + sine_position(*maps[i].shape[1:3], x.shape[2], x.device, x.dtype))
        x = torch.cat([*tokens, self.word_in(words) + self.word_positions[:count]], dim=1)
        pixels = x.shape[1] - count
        read = torch.cat([mask.new_ones(mask.shape[0], pixels), mask], dim=1)
        for layer in self.encoder:
            x = layer(x, mask=read)
        return self.encoder_norm(x).split([pixels, count], dim=1)


class Layer(nn.Module):
    """x + attention(norm(x), read), then x + FFN(norm(x)): (B, N, C), as the attention reads (B, M, C)."""

    is_repeated_layer = True

    def __init__(self, attention: nn.Module, width: int, feedforward: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width))

    def forward(self, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`read`: x itself where None. `mask`: bool, of the words, be they those that read or those that are read."""
        y = self.norm1(x)
        x = x + self.attention(y, y if read is None else read, mask)
        return x + self.feedforward(self.norm2(x))


class SelfAttention(Attention):
    """Tokens, few or many, read tokens: forward(x (B, N, C), read (B, M, C), mask (B, M))."""

    def forward(self, x: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, read, read, None if mask is None else mask[:, None, None])


class ReadPixels(TokenAttention):
    """Words read pixels, all of them: forward(words (B, T, C), pixels (B, P, C), mask (B, T) of the words)."""

    def forward(self, x: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        _, attended = ops.cross_modal_attention(
            None,
            None,
            None,
            text_query=self.query(x),
            image_key=self.key(read),
            image_value=self.value(read),
            text_mask=mask,
            num_heads=self.heads,
        )
        return self.output(attended)


class DetailEnhancement(nn.Module):
    """What is known of the referent says where a finer map's details count.

    forward(x (B, d, h, w), detail (B, C, H, W)) returns (B, d, H, W).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(width, width, 1)
        self.lateral = nn.Conv2d(channels, width, 1)
        self.join = nn.Sequential(*conv_norm_relu(2 * width, width))

    def forward(self, x: Tensor, detail: Tensor) -> Tensor:
        x = enlarge(x, detail.shape[2:])
        detail = (1 + self.weigh(x).sigmoid()) * self.lateral(detail)
        return self.join(torch.cat([x, detail], dim=1))


def middle_map(strides: tuple[int, ...], kind: str) -> int:
    """Which map words and pixels meet on first: the deepest of the finest whose stride is at least 16.

    Raises:
        ValueError: there is none, or no finer one.
    """
    coarse = [stride for stride in strides if stride >= COARSE]
    if not coarse or min(strides) >= COARSE:
        raise ValueError(
            f"head: {kind} reads a map of stride {COARSE} or more, and finer ones; this fusion gives strides {strides}"
        )
    return max(i for i, stride in enumerate(strides) if stride == min(coarse))


def _project(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width))
