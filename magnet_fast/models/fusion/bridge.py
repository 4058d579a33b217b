"""NSNPRIS's fusion: words and three maps meet on one grid after every slice, then once more, and become one map.

NSNPRIS, IJNS 2024, by what is public of its code (bridger.py and layers.py, a variant of ETRIS): the grid and its
width, what follows from stage to stage, the interaction (post-norm; self-attention, cross-attention, FFN), the gate of
the words and the last exchange. Our choice: ConvSNP order wherever a map comes to the grid and back (there in the ViT
form alone), no dropout, padded words are masked (there they are read), the third and the last exchange read the map
after CLIP's attention pool and the words after the last norm, and CRIS's neck joins the three maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.attention import Attention, TokenAttention
from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words, changed
from magnet_fast.models.fusion.neck import Neck
from magnet_fast.models.fusion.pixel_word import PixelInstanceNorm

_MAPS = 3


@part
class BridgeConfig(FusionConfig):
    """The last three maps to one, of the middle one's stride and `widths[1]` channels; earlier maps pass untouched."""

    kind: Literal["bridge"] = "bridge"
    width: int = Field(64, gt=0, description="channels on the grid, and between the Linears of the words' gate")
    num_heads: int = Field(8, gt=0)
    feedforward: int = Field(128, gt=0)
    joint_width: int = Field(1024, gt=0, description="channels of the last exchange")
    widths: tuple[int, int, int] = Field((256, 512, 1024), description="of the finest, middle and coarsest in the neck")

    @model_validator(mode="after")
    def _divisible(self) -> BridgeConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        strides = image.strides[-_MAPS:]
        if len(strides) != _MAPS or strides[1] != 2 * strides[0] or strides[2] % strides[1]:
            raise ValueError(
                f"fusion: bridge joins {_MAPS} maps, the second of twice the first one's stride and the third of a "
                f"multiple of it; the image encoder's strides are {image.strides}"
            )

    def channels(self, image: ImageConfig) -> tuple[int, ...]:
        return (self.widths[1],)

    def strides(self, image: ImageConfig) -> tuple[int, ...]:
        return (image.strides[-2],)

    def build(self, image: ImageConfig, text: TextConfig) -> Bridge:
        return Bridge(self, image, text)


class Pair(NamedTuple):
    """Both sides on the grid, before they read each other: pixels (B, h·w, C), words (B, T, C); size is (h, w)."""

    pixels: Tensor
    words: Tensor
    size: tuple[int, int]


class Bridge(Fusion):
    """Gives one map (B, H, W, C). What each exchange adds goes into the stream and into the words.

    The sentence is the text encoder's where that says one, else the mean of the words after the last exchange.
    """

    def __init__(self, config: BridgeConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        channels, strides = image.channels[-_MAPS:], image.strides[-_MAPS:]
        self.first = len(image.channels) - _MAPS
        self.stages = nn.ModuleList(
            BridgeStage(config, width, text.width, stride, strides[1], follows=stage > 0)
            for stage, (width, stride) in enumerate(zip(channels, strides, strict=True))
        )
        self.gate = LanguageGate(text.width, config.width)
        self.last = LastExchange(channels[-1], text.width, config.joint_width)
        self.neck = Neck(channels, text.sentence_width, config.widths)

    def forward(
        self, i: int, x: Tensor, words: Words, carry: tuple[list[Tensor], Pair] | None, context: Mapping[str, Tensor]
    ) -> Step:
        if i < self.first:
            return Step(None, x, words)
        maps, pair = carry or ([], None)
        x, features, pair = self.stages[i - self.first](x, words.features, words.mask, pair)
        words, maps = changed(words, features=self.gate(features)), [*maps, x]
        if len(maps) < _MAPS:
            return Step(None, x, words, carry=(maps, pair))
        *finer, x = maps
        x, features = self.last(x, words.features, words.mask)
        words = changed(words, features=features)
        joined = self.neck(*(one.permute(0, 3, 1, 2) for one in (*finer, x)), words.sentence).permute(0, 2, 3, 1)
        return Step(joined, x, words)


class BridgeStage(nn.Module):
    """One exchange on the grid: v' = I(v, t), t' = I(t, v), brought back and added to map and words.

    forward(x (B, H, W, C), words (B, T, D), mask (B, T), the stage's before `Pair`, or None at the first) returns map
    and words of the same shapes, and this stage's `Pair`.

    Args:
        stride, grid: of the map and of the grid, in pixels of the image.
        follows: whether there is a stage before: v and t are then normed sums with that one's.
    """

    def __init__(
        self, config: BridgeConfig, channels: int, text_width: int, stride: int, grid: int, *, follows: bool
    ) -> None:
        super().__init__()
        width, self.stride, self.grid = config.width, stride, grid
        self.pixel_in, self.pixel_out = Zoom(channels, width, stride, grid), Zoom(width, channels, grid, stride)
        self.word_in, self.word_out = nn.Linear(text_width, width), nn.Linear(width, text_width)
        self.pixel_norm, self.word_norm = (nn.LayerNorm(width) if follows else None for _ in range(2))
        self.pixels, self.words = (Interaction(width, config.num_heads, config.feedforward) for _ in range(2))

    def forward(self, x: Tensor, words: Tensor, mask: Tensor, before: Pair | None) -> tuple[Tensor, Tensor, Pair]:
        size = x.shape[1:3]
        grid = tuple(-(-side * self.stride // self.grid) for side in size) if before is None else before.size
        v = self.pixel_in(x.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
        t = self.word_in(words)
        if before is not None:
            v, t = self.pixel_norm(v + before.pixels), self.word_norm(t + before.words)
        seen = self.pixels(v, t, None, mask).transpose(1, 2).unflatten(2, grid)
        read = self.words(t, v, mask, None)
        x = x + self.pixel_out(seen, size).permute(0, 2, 3, 1)
        return x, words + self.word_out(read), Pair(v, t, grid)


class Zoom(nn.Module):
    """ConvSNP: BatchNorm, ReLU, then a convolution without bias, from one stride to another.

    The kernel has the size of its step: a convolution towards the coarser, a transposed one towards the finer.
    forward(x (B, C, h, w), size) returns (B, out, *size); what a step does not divide is filled up with zeros.
    """

    def __init__(self, channels: int, out: int, stride: int, wanted: int) -> None:
        super().__init__()
        self.step = max(1, wanted // stride)
        self.norm = nn.BatchNorm2d(channels)
        kind, step = (nn.Conv2d, self.step) if wanted >= stride else (nn.ConvTranspose2d, stride // wanted)
        self.conv = kind(channels, out, step, stride=step, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.relu(self.norm(x))
        if self.step > 1:
            x = F.pad(x, (0, -x.shape[3] % self.step, 0, -x.shape[2] % self.step))
        return self.conv(x)[:, :, : size[0], : size[1]]


class Interaction(nn.Module):
    """x attends to itself, reads the other side, and passes a feed-forward network; post-norm.

    forward(x (B, N, C), other (B, M, C), mask of x (B, N) and of the other (B, M), or None) returns (B, N, C).
    """

    def __init__(self, width: int, num_heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attention = Attention(width, num_heads, dropout=0.0)
        self.read = TokenAttention(width, num_heads)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(), nn.Linear(feedforward, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
        allowed = None if mask is None else mask[:, None, None]
        x = self.norm1(x + self.self_attention(x, x, x, allowed))
        x = self.norm2(x + self.read(x, other, other_mask))
        return self.norm3(x + self.feedforward(x))


class LanguageGate(nn.Module):
    """t + σ(W₂ ELU(W₁ t)) ⊙ t without biases: (B, T, D) to the same. One for all stages."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        return words + self.second(F.elu(self.first(words))).sigmoid() * words


class LastExchange(nn.Module):
    """Both sides to one width and to length 1, three rectified projections each, attention both ways, added back.

    The pixels' projections are normed over their image first. forward(x (B, H, W, C), words (B, T, D), mask (B, T))
    returns map and words of the same shapes.
    """

    def __init__(self, channels: int, text_width: int, joint: int) -> None:
        super().__init__()
        self.scale = joint**-0.5
        self.pixel_in, self.word_in = nn.Linear(channels, joint), nn.Linear(text_width, joint)
        self.norm = PixelInstanceNorm()
        self.image_query, self.image_key, self.image_value = (nn.Linear(joint, joint, bias=False) for _ in range(3))
        self.text_query, self.text_key, self.text_value = (nn.Linear(joint, joint) for _ in range(3))
        self.pixel_out, self.word_out = nn.Linear(joint, channels), nn.Linear(joint, text_width)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels = F.normalize(self.pixel_in(x.flatten(1, 2)), dim=-1)
        tokens = F.normalize(self.word_in(words), dim=-1)
        image_query, image_key, image_value = (
            F.relu(self.norm(linear(pixels))) for linear in (self.image_query, self.image_key, self.image_value)
        )
        text_query, text_key, text_value = (
            F.relu(linear(tokens)) for linear in (self.text_query, self.text_key, self.text_value)
        )
        to_pixels, to_words = ops.cross_modal_attention(
            image_query, text_key, text_value, text_query, image_key, image_value, text_mask=mask, scale=self.scale
        )
        return x + self.pixel_out(to_pixels).unflatten(1, x.shape[1:3]), words + self.word_out(to_words)
