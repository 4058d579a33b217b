"""CRIS's head: pixels read the words, and the sentence makes the kernel that finds its pixels (CVPR 2022)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.attention import Attention
from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction
from magnet_fast.models.encoders.clip_resnet import conv_norm_relu
from magnet_fast.models.fusion.neck import enlarge
from magnet_fast.models.position import grid_position, line_position

KERNEL = 3


@part
class TextKernelConfig(HeadConfig):
    """Sizes of decoder and projector."""

    kind: Literal["text_kernel"] = "text_kernel"
    layers: int = Field(3, gt=0)
    num_heads: int = Field(8, gt=0)
    feedforward: int = Field(2048, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    def pixel_channels(self, shapes: Shapes) -> int:
        return shapes.channels[0] // 2

    def check(self, shapes: Shapes) -> None:
        if len(shapes.channels) != 1:
            raise ValueError(f"head: text_kernel reads one map; this fusion gives {len(shapes.channels)}")
        width = shapes.channels[0]
        if width % self.num_heads or width % 4:
            raise ValueError(
                f"head: the map's {width} channels must be a multiple of 4 and of num_heads={self.num_heads}"
            )
        if shapes.text_width != width:
            raise ValueError(
                f"head: words have {shapes.text_width} channels, pixels {width}; text_kernel wants them alike"
            )

    def build(self, shapes: Shapes) -> TextKernel:
        return TextKernel(shapes, self)


class TextKernel(Head):
    """The mask has a fourth of the image's sides; `pixels` is the map that the kernel goes over."""

    def __init__(self, shapes: Shapes, config: TextKernelConfig) -> None:
        super().__init__()
        width = shapes.channels[0]
        self.pixel_channels = width // 2
        self.layers = nn.ModuleList(WordReader(width, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.projector = Projector(width, self.pixel_channels, shapes.sentence_width)

    def forward(self, features: Features) -> Prediction:
        (x,), words = features.maps, features.words
        size, pixels = x.shape[1:3], x.flatten(1, 2)
        place = grid_position(*size, x.shape[3], x)
        word_place = line_position(words.features.shape[1], x.shape[3], x)
        allowed = words.mask[:, None, None]
        for layer in self.layers:
            pixels = layer(pixels, place, words.features, word_place, allowed)
        fused = self.norm(pixels).transpose(1, 2).unflatten(2, size)
        mask, embedding = self.projector(fused, words.sentence, features.size)
        return Prediction(mask, pixels=embedding, words=words)


class WordReader(nn.Module):
    """Pixels attend to pixels and to words, then a feed-forward network; pre-norm, and each branch normed once more.

    forward(x (B, P, C), place (P, C), words (B, T, C), word_place (T, C), allowed (B, 1, 1, T)) returns (B, P, C).
    """

    is_repeated_layer = True

    def __init__(self, width: int, config: TextKernelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, config.num_heads, config.dropout)
        self.self_norm = nn.LayerNorm(width)
        self.word_attention = Attention(width, config.num_heads, config.dropout)
        self.word_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, config.feedforward),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.LayerNorm(config.feedforward),
            nn.Linear(config.feedforward, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, place: Tensor, words: Tensor, word_place: Tensor, allowed: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_norm(self.self_attention(y + place, y + place, y)))
        y = self.norm2(x)
        x = x + self.dropout(self.word_norm(self.word_attention(y + place, words + word_place, words, allowed)))
        return x + self.dropout(self.feedforward(self.norm3(x)))


class Projector(nn.Module):
    """Pixels enlarged to a fourth of the image, and convolved with a kernel and a bias that the sentence makes."""

    def __init__(self, width: int, pixel_channels: int, sentence_width: int) -> None:
        super().__init__()
        self.enlarge1 = nn.Sequential(*conv_norm_relu(width, width))
        self.enlarge2 = nn.Sequential(*conv_norm_relu(width, pixel_channels))
        self.pixels = nn.Conv2d(pixel_channels, pixel_channels, 1)
        self.kernel = nn.Linear(sentence_width, pixel_channels * KERNEL**2 + 1)

    def forward(self, x: Tensor, sentence: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """x (B, C, h, w), sentence (B, E), the image's size to mask logits and the map below them (B, c, H/4, W/4)."""
        x = self.enlarge1(enlarge(x, part_of(size, 8)))
        pixels = self.pixels(self.enlarge2(enlarge(x, part_of(size, 4))))
        kernels, bias = self.kernel(sentence).split([pixels.shape[1] * KERNEL**2, 1], dim=1)
        # Every image is convolved with its own kernel: a group of a convolution over all of them.
        kernels = kernels.unflatten(1, (pixels.shape[1], KERNEL, KERNEL))
        batch = pixels.shape[0]
        mask = F.conv2d(pixels.flatten(0, 1)[None], kernels, bias[:, 0], padding=KERNEL // 2, groups=batch)
        return mask[0], pixels


def part_of(size: tuple[int, int], stride: int) -> tuple[int, int]:
    height, width = (-(-side // stride) for side in size)
    return height, width
