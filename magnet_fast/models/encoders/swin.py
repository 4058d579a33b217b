"""The image encoder: Swin transformer stages on the fused window attention.

Liu et al., "Swin Transformer", ICCV 2021, in the form used for dense prediction: the map is padded at the right and at
the bottom where a size does not divide, and odd blocks always shift by half a window. Feature maps are channels-last,
(B, H, W, C), from patch embedding to stage output.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import ImageEncoder
from magnet_fast.models.config import ImageConfig, part
from magnet_fast.models.encoders.swin_weights import published_swin, read_swin
from magnet_fast.models.position import sine_position
from magnet_fast.models.state import load_strictly


@part
class SwinConfig(ImageConfig):
    """A Swin transformer (version 1): channels double and resolution halves from stage to stage."""

    kind: Literal["swin"] = "swin"
    embed_dim: int = Field(128, gt=0, description="channels of the first stage")
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    num_heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    window_size: int = Field(12, gt=0, description="side of an attention window, in tokens")
    drop_path: float = Field(0.3, ge=0, lt=1, description="stochastic depth of the last block; grows linearly")
    absolute_position: bool = Field(False, description="add a sine position to the patches (Swin's option 'ape')")

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**stage for stage in range(4))

    @property
    def strides(self) -> tuple[int, ...]:
        return (4, 8, 16, 32)

    def build(self) -> SwinEncoder:
        return SwinEncoder(self)

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> SwinConfig:
        for stage, (channels, heads) in enumerate(zip(self.channels, self.num_heads, strict=True)):
            if channels % heads:
                raise ValueError(f"num_heads[{stage}]={heads} does not divide the stage's {channels} channels")
        return self


class SwinEncoder(ImageEncoder):
    """Patch embedding and four stages."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config, self.channels, self.strides = config, config.channels, config.strides
        self.patch_embed = PatchEmbed(config.embed_dim, config.absolute_position)
        self.stages = nn.ModuleList(SwinStage(config, stage) for stage in range(4))
        self.apply(_initialise)

    def start(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def stage(self, i: int, stream: Tensor) -> Tensor:
        return self.stages[i](stream)

    def descend(self, i: int, stream: Tensor) -> Tensor:
        return self.stages[i].downsample(stream)

    def load_pretrained(self, source: str | None) -> None:
        name = source or published_swin(self.config.embed_dim, self.config.depths)
        load_strictly(self, read_swin(name, self.config.window_size), f"image weights {name!r}")
        self.resized = frozenset(name for name in self.state_dict() if name.endswith("bias_table"))


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next (None after the last stage)."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        channels = config.channels[stage]
        before, last = sum(config.depths[:stage]), max(1, sum(config.depths) - 1)
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels,
                config.num_heads[stage],
                config.window_size,
                shift=config.window_size // 2 if index % 2 else 0,
                drop_path=config.drop_path * (before + index) / last,
            )
            for index in range(config.depths[stage])
        )
        self.downsample = PatchMerging(channels) if stage < 3 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SwinBlock(nn.Module):
    """Pre-norm block: window attention, then an MLP of four times the width."""

    is_repeated_layer = True

    def __init__(self, channels: int, num_heads: int, window_size: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, num_heads, window_size, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """Projections and relative-position-bias table around `ops.window_attention`."""

    def __init__(self, channels: int, num_heads: int, window_size: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.qkv.stacked = 3  # three projections in one weight: an optimiser of matrices takes them one by one
        self.proj = nn.Linear(channels, channels)
        self.bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        # Padded tokens are zero before the projection, so their query, key and value are its bias.
        x = F.pad(x, (0, 0, 0, -width % self.window_size, 0, -height % self.window_size))
        attended = ops.window_attention(
            self.qkv(x),
            self.bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
        )
        return self.proj(attended[:, :height, :width])


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) to tokens (B, ⌈H/4⌉, ⌈W/4⌉, C): convolution 4×4 of stride 4, then LayerNorm.

    `absolute_position` adds a sine encoding of row and column. Windows know relative places only; a pretrained Swin
    finds out the rest from its padding, a small one that starts from nothing needs it for "left" and "top".
    """

    patch = 4

    def __init__(self, channels: int, absolute_position: bool) -> None:
        super().__init__()
        self.absolute_position = absolute_position
        self.proj = nn.Conv2d(3, channels, self.patch, self.patch)
        self.norm = nn.LayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.patch, 0, -height % self.patch))
        x = self.norm(self.proj(image).permute(0, 2, 3, 1))
        if self.absolute_position:
            x = x + self.position(x)
        return x

    def position(self, x: Tensor) -> Tensor:
        """The sine encoding of the places of x (B, H, W, C), (1, H, W, C)."""
        rows, columns, channels = x.shape[1:]
        return sine_position(rows, columns, channels, x.device, x.dtype).view(1, rows, columns, channels)


class PatchMerging(nn.Module):
    """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C): 2×2 neighbours concatenated, LayerNorm, Linear without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.neighbours(x)))

    def neighbours(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 4C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels)
        # Neighbours in the order (0,0) (1,0) (0,1) (1,1) of (row, column): column outermost.
        return x.permute(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)


def _initialise(module: nn.Module) -> None:
    # Xavier, our choice: Swin's fixed 0.02 starves the narrow presets, and pretrained weights replace it anyway.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
