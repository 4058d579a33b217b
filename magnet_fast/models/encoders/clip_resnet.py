"""CLIP's ResNet with its attention pool kept as a map, as CRIS uses it.

Radford et al., ICML 2021; Wang et al., CVPR 2022.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.base import ImageEncoder
from magnet_fast.models.config import ImageConfig, part
from magnet_fast.models.encoders.clip_weights import load_clip

_HEAD_DIM = 64
_EXPANSION = 4
_NORMALISATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@part
class ClipResNetConfig(ImageConfig):
    """RN50 unless said."""

    kind: Literal["clip_resnet"] = "clip_resnet"
    stem: int = Field(64, gt=1, description="channels of the stem; stages have 4, 8, 16 and 32 times as many")
    blocks: tuple[int, int, int, int] = Field((3, 4, 6, 3), description="of each stage")
    joint_width: int = Field(1024, gt=0, description="channels of the last map, CLIP's joint space")
    table_side: int = Field(7, gt=0, description="side of the table of positions")

    @model_validator(mode="after")
    def _divisible(self) -> ClipResNetConfig:
        if self.stem % 2 or 32 * self.stem % _HEAD_DIM:
            raise ValueError(f"stem={self.stem} must be even, and 32 times it a multiple of {_HEAD_DIM}")
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        return 8 * self.stem, 16 * self.stem, self.joint_width

    @property
    def strides(self) -> tuple[int, ...]:
        return 8, 16, 32

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return _NORMALISATION

    def build(self) -> ClipResNet:
        return ClipResNet(self)


class ClipResNet(ImageEncoder):
    """Maps of strides 8, 16 and 32; sizes are rounded up."""

    def __init__(self, config: ClipResNetConfig) -> None:
        super().__init__()
        self.channels, self.strides = config.channels, config.strides
        half = config.stem // 2
        self.stem = nn.Sequential(
            *conv_norm_relu(3, half, stride=2),
            *conv_norm_relu(half, half),
            *conv_norm_relu(half, config.stem),
            half_size(),
        )
        layers, width = [], config.stem
        for index, count in enumerate(config.blocks):
            inner = config.stem * 2**index
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(width, inner, stride=2 if index and not block else 1))
                width = _EXPANSION * inner
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.ModuleList(layers)
        self.pool = AttentionPool(width, config.joint_width, config.table_side)

    def start(self, image: Tensor) -> Tensor:
        return self.layers[0](self.stem(image))

    def stage(self, i: int, stream: Tensor) -> Tensor:
        x = self.layers[i + 1](stream)
        if i == 2:
            x = self.pool(x)
        return x.permute(0, 2, 3, 1)

    def descend(self, i: int, stream: Tensor) -> Tensor:
        return stream.permute(0, 3, 1, 2)

    def load_pretrained(self, source: str | None) -> None:
        load_clip(self, source, "image", clip_image_names)


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool by the stride, 1x1; each convolution without bias and with a BatchNorm."""

    is_repeated_layer = True

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        wide = _EXPANSION * inner
        pool = [half_size()] if stride > 1 else []
        self.branch = nn.Sequential(
            *conv_norm_relu(channels, inner, size=1),
            *conv_norm_relu(inner, inner),
            nn.Sequential(*pool),
            nn.Conv2d(inner, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != wide:
            self.shortcut = nn.Sequential(
                nn.Sequential(*pool), nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class AttentionPool(nn.Module):
    """CLIP's attention pool with every pixel as a query, beside a projection of its own: (B, C, h, w) to (B, E, h, w).

    The positions' first row is that of CLIP's mean token, which is not here; it is kept so that files fit.
    """

    def __init__(self, channels: int, joint_width: int, table_side: int) -> None:
        super().__init__()
        self.heads, self.table_side = channels // _HEAD_DIM, table_side
        self.positions = nn.Parameter(torch.randn(table_side**2 + 1, channels) * channels**-0.5)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.output = nn.Linear(channels, joint_width)
        self.connect = nn.Sequential(nn.Conv2d(channels, joint_width, 1, bias=False), nn.BatchNorm2d(joint_width))
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        table = self.positions[1:].T.unflatten(1, (self.table_side, self.table_side))[None]
        places = F.interpolate(table, size=size, mode="bicubic", align_corners=False)
        tokens = (x + places.to(x.dtype)).flatten(2).transpose(1, 2)
        q, k, v = (
            linear(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        joint = self.output(attended).transpose(1, 2).unflatten(2, size)
        return F.relu(joint + self.connect(x))


def conv_norm_relu(channels: int, out: int, *, size: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """A convolution without bias, a BatchNorm and a ReLU."""
    padding = dilation * (size // 2)
    convolution = nn.Conv2d(channels, out, size, stride=stride, padding=padding, dilation=dilation, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU()]


def half_size() -> nn.AvgPool2d:
    """Means of 2x2 pixels, of fewer at an odd side's end."""
    return nn.AvgPool2d(2, ceil_mode=True)


def clip_image_names(prefix: str) -> list[tuple[str, str]]:
    """Pairs of (CLIP's name after `prefix`, ours below the encoder) as patterns."""
    convolutions = {"1": (0, 1), "2": (3, 4), "3": (6, 7)}
    stem = [
        pair
        for number, (conv, norm) in convolutions.items()
        for pair in (
            (rf"{prefix}conv{number}\.(.*)", rf"stem.{conv}.\1"),
            (rf"{prefix}bn{number}\.(.*)", rf"stem.{norm}.\1"),
        )
    ]
    # Stages count from 1 in CLIP's names.
    blocks = [
        pair
        for layer in range(4)
        for old, new in (
            *((f"conv{number}", f"branch.{conv}") for number, conv in (("1", 0), ("2", 3), ("3", 7))),
            *((f"bn{number}", f"branch.{norm}") for number, norm in (("1", 1), ("2", 4), ("3", 8))),
            (r"downsample\.0", "shortcut.1"),
            (r"downsample\.1", "shortcut.2"),
        )
        for pair in [(rf"{prefix}layer{layer + 1}\.(\d+)\.{old}\.(.*)", rf"layers.{layer}.\1.{new}.\2")]
    ]
    pool = [
        (rf"{prefix}attnpool\.positional_embedding", "pool.positions"),
        (rf"{prefix}attnpool\.q_proj\.(.*)", r"pool.query.\1"),
        (rf"{prefix}attnpool\.k_proj\.(.*)", r"pool.key.\1"),
        (rf"{prefix}attnpool\.v_proj\.(.*)", r"pool.value.\1"),
        (rf"{prefix}attnpool\.c_proj\.(.*)", r"pool.output.\1"),
        (rf"{prefix}attnpool\.connect\.(.*)", r"pool.connect.\1"),
    ]
    return [*stem, *blocks, *pool]
