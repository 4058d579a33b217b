"""FSFI's fusion: a grid of the image reads the words, and pixels are convolved with what it has read.

After Yang et al., "Referring Image Segmentation With Fine-Grained Semantic Funneling Infusion" (TNNLS 2024), and its
released code, in which the dynamic convolution is missing: that one is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words

_CELL = 32  # pixels of the image to a side of the released form's cells: 10 x 10 of them at 320 x 320


@part
class FunnelConfig(FusionConfig):
    """Words enter the stream after every stage from the `first` on; maps before it go to the head as they are."""

    kind: Literal["funnel"] = "funnel"
    width: int = Field(512, gt=0, description="channels inside")
    heads: int = Field(8, gt=0, description="of the dynamic convolution")
    grid: int = Field(10, gt=0, description="cells to a side, whatever the map's size: each makes a kernel")
    first: int = Field(0, ge=0, description="the first stage that words enter: 1 where the stem is a stage")
    form: Literal["free", "released"] = Field(
        "free",
        description="free: cells are means, of images of any size, and padded words are no keys; released: cells are "
        "convolutions of 32x32 pixels, of images of 32 * grid pixels a side, and padding is read",
    )

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if self.width % self.heads:
            raise ValueError(f"fusion.heads={self.heads} does not divide width={self.width}")
        if self.first >= len(image.channels):
            raise ValueError(f"fusion.first={self.first}: the image encoder has {len(image.channels)} stages")
        wrong = [stride for stride in image.strides[self.first :] if _CELL % stride]
        if self.form == "released" and wrong:
            raise ValueError(f"fusion.form='released': expected strides that divide {_CELL}, got {wrong[0]}")

    def build(self, image: ImageConfig, text: TextConfig) -> FunnelFusion:
        return FunnelFusion(self, image, text)


class FunnelFusion(Fusion):
    """A `FunnelStage` for each stage that words enter."""

    def __init__(self, config: FunnelConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        self.first = config.first
        self.stages = nn.ModuleList(
            FunnelStage(channels, stride, text.width, config)
            for channels, stride in list(zip(image.channels, image.strides, strict=True))[config.first :]
        )

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        if i >= self.first:
            x = self.stages[i - self.first](x, words.features, words.mask)
        return Step(x, x, words)


class FunnelStage(nn.Module):
    """forward(x (B, H, W, C), words (B, T, D), word_mask (B, T)) returns (B, H, W, C)."""

    def __init__(self, channels: int, stride: int, text_width: int, config: FunnelConfig) -> None:
        super().__init__()
        width = config.width
        self.released, self.grid = config.form == "released", config.grid
        cell = _CELL // stride if self.released else 1
        self.cells = nn.Conv2d(channels, width, cell, stride=cell)
        self.words = nn.Sequential(*_linear_norm_relu(text_width, width), *_linear_norm_relu(width, width))
        self.value = nn.Sequential(*_conv_norm_prelu(channels, width))
        self.convolution = DynamicConvolution(width, config.grid**2, config.heads)
        self.output = nn.Sequential(*_conv_norm_prelu(width, channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        x, words = x.permute(0, 3, 1, 2), self.words(words)
        mask = None if self.released else word_mask
        kernels, _ = ops.cross_modal_attention(self._cells(x).flatten(2).transpose(1, 2), words, words, text_mask=mask)
        x = F.relu(self.norm(x + self.output(self.convolution(self.value(x), kernels))))
        return x.permute(0, 2, 3, 1)

    def _cells(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, width, grid, grid)."""
        if not self.released:
            return self.cells(F.adaptive_avg_pool2d(x, self.grid))
        side, (cell, _) = self.grid, self.cells.kernel_size
        if x.shape[2:] != (side * cell, side * cell):
            height, width = x.shape[2:]
            raise ValueError(
                f"image: fusion.form='released' expected {_CELL * side}x{_CELL * side} pixels, a map of "
                f"{side * cell}x{side * cell} at this stage; got one of {height}x{width}"
            )
        return self.cells(x)


class DynamicConvolution(nn.Module):
    """Pixels against the sentence's own kernels, in heads of few channels; what answers becomes channels [our choice].

    In a head of d channels: R = pixels · kernelsᵀ / √d, then a learned map of ReLU(R) to d channels, the same for every
    image.
    """

    def __init__(self, width: int, kernels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Conv2d(heads * kernels, width, 1, groups=heads, bias=False)  # a BatchNorm follows

    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        """x (B, C, H, W) and kernels (B, K, C) to (B, C, H, W)."""
        pixels = x.flatten(2).unflatten(1, (self.heads, -1))  # (B, heads, d, P)
        own = kernels.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, K, d)
        responses = own @ pixels * pixels.shape[2] ** -0.5
        return self.mix(F.relu(responses).flatten(1, 2).unflatten(2, x.shape[2:]))


def _linear_norm_relu(channels: int, width: int) -> list[nn.Module]:
    return [nn.Linear(channels, width), nn.LayerNorm(width), nn.ReLU()]


def _conv_norm_prelu(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU()]
