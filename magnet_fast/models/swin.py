"""The image encoder: Swin transformer stages on the fused window attention.

Liu et al., "Swin Transformer", ICCV 2021, in the form used for dense prediction: the map is padded at the
right and at the bottom where a size does not divide, and odd blocks always shift by half a window.
Feature maps are channels-last, (B, H, W, C), from patch embedding to stage output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from .. import ops
from ..ops import _linear_chain
from ..ops._linear_chain import Step
from .config import ImageEncoderConfig
from .position import sine_position
from .project import project
from .tokenwise import tokenwise


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
        image = F.pad(image.to(self.proj.weight.dtype), (0, -width % self.patch, 0, -height % self.patch))
        x = self.norm(self.proj(image).permute(0, 2, 3, 1))
        if self.absolute_position:
            rows, columns, channels = x.shape[1:]
            x = x + sine_position(rows, columns, channels, x.device, x.dtype).view(1, rows, columns, channels)
        return x


class WindowAttention(nn.Module):
    """Projections and relative-position-bias table around `ops.window_attention`."""

    def __init__(self, channels: int, num_heads: int, window_size: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.proj, self.attend(project(self.qkv, x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C) to (B, H, W, C): what lies between the projections."""
        return ops.window_attention(
            qkv,
            self.bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            pad_qkv=self.qkv.bias,  # a zero token after norm1 has exactly the Linear's bias as q, k and v
        )


class Mlp(nn.Module):
    """Linear, exact GELU, Linear; plus the residual, if one is given."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return project(self.fc2, project(self.fc1, x, activation="gelu"), residual=residual)


class SwinBlock(nn.Module):
    """Pre-norm block: window attention, then an MLP of four times the width."""

    def __init__(self, channels: int, num_heads: int, window_size: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, num_heads, window_size, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._known_parts():
            before, after = self._chains()
            if _linear_chain.runs(x, [*before, *after], around=self.modules()):
                attended = self.attention.attend(_linear_chain.run(x, before))
                return _linear_chain.run(attended, after, residual=x)
        attended = self.drop_path(self.attention(self.norm1(x)))
        return tokenwise(self, self._after_attention, x, attended, width=self.mlp.fc1.out_features)

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        if self.drop_path.training:
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return self.mlp(self.norm2(x), residual=x)

    def _known_parts(self) -> bool:
        """Whether nobody put another module in a part's place, and no residual is dropped."""
        parts = type(self.attention) is WindowAttention and type(self.mlp) is Mlp
        return parts and type(self.drop_path) in (DropPath, nn.Identity) and not self.drop_path.training

    def _chains(self) -> tuple[list[Step], list[Step]]:
        """The layers before attention and those after it."""
        after = [
            Step(self.attention.proj, residual="given"),
            Step(self.mlp.fc1, activation="gelu", before=self.norm2),
            Step(self.mlp.fc2, residual=0),
        ]
        return [Step(self.attention.qkv, before=self.norm1)], after


class PatchMerging(nn.Module):
    """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C): 2×2 neighbours concatenated, LayerNorm, Linear without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels)
        # Neighbours in the order (0,0) (1,0) (0,1) (1,1) of (row, column): column outermost.
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        return project(self.reduction, self.norm(x))


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next (None after the last stage)."""

    def __init__(self, config: ImageEncoderConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        channels = config.channels[stage]
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels,
                config.num_heads[stage],
                config.window_size,
                shift=config.window_size // 2 if index % 2 else 0,
                drop_path=drop_path[index],
            )
            for index in range(config.depths[stage])
        )
        self.downsample = PatchMerging(channels) if stage < 3 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SwinEncoder(nn.Module):
    """Patch embedding and four stages; the model between the stages decides what flows on.

    The model calls `first_stage`, then for each of the other `stages` the stage itself; unless it is the last, a
    stage's `downsample` follows: language enters between the two (LAVT, MagNet).
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.embed_dim, config.absolute_position)
        count = sum(config.depths)
        rates = [config.drop_path * block / max(1, count - 1) for block in range(count)]
        starts = [sum(config.depths[:stage]) for stage in range(4)]
        self.stages = nn.ModuleList(
            SwinStage(config, stage, rates[start : start + depth])
            for stage, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )
        self.apply(_initialise)

    def first_stage(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) to the first stage's feature (B, ⌈H/4⌉, ⌈W/4⌉, C), which no word has reached.

        One image that was expanded to a batch, for several expressions, is computed once.
        """
        batch = image.shape[0]
        repeated = batch > 1 and image.stride(0) == 0 and not self.training  # DropPath draws for each item
        feature = self.stages[0](self.patch_embed(image[:1] if repeated else image))
        return feature.expand(batch, -1, -1, -1) if repeated else feature


def _initialise(module: nn.Module) -> None:
    # Xavier, our choice: Swin's fixed 0.02 starves the narrow presets, and pretrained weights replace it anyway.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
