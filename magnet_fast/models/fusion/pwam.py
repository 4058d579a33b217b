"""LAVT's fusion: words enter the pixels after every stage, and the words stay as they are (Yang et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.pixel_word import PWAM, Gate


@part
class PWAMConfig(FusionConfig):
    """A PWAM after every stage."""

    kind: Literal["pwam"] = "pwam"
    heads: int | tuple[int, ...] = Field(1, description="of every stage's attention, or a number for each stage")
    dropout: float = Field(0.0, ge=0, lt=1)

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        stage_heads(self.heads, image.channels)

    def build(self, image: ImageConfig, text: TextConfig) -> PWAMFusion:
        return PWAMFusion(self, image, text)


class PWAMFusion(Fusion):
    """A `PWAMStage` for each of the image encoder's stages."""

    def __init__(self, config: PWAMConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        last = len(image.channels) - 1
        heads = stage_heads(config.heads, image.channels)
        self.stages = nn.ModuleList(
            PWAMStage(channels, text.width, heads[i], config.dropout, gated=image.in_stream and i < last)
            for i, channels in enumerate(image.channels)
        )

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        output, stream = self.stages[i](x, words.features, words.mask)
        return Step(output, stream, words)


class PWAMStage(nn.Module):
    """A PWAM residual, normed for the head and gated into the stream.

    Args:
        gated: False where nothing reads the stream; it then passes as it is.
    """

    def __init__(self, channels: int, text_width: int, num_heads: int, dropout: float, *, gated: bool) -> None:
        super().__init__()
        self.fusion = PWAM(channels, text_width, num_heads=num_heads, norm="instance", dropout=dropout)
        self.norm = nn.LayerNorm(channels)
        self.gate = Gate(channels, "relu") if gated else None

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, H, W, C) → (output for the head, stream), both (B, H, W, C)."""
        residual = self.fusion(x.flatten(1, 2), words, word_mask).unflatten(1, x.shape[1:3])
        return self.norm(residual), x if self.gate is None else self.gate(x, residual)


def stage_heads(heads: int | tuple[int, ...], channels: tuple[int, ...]) -> tuple[int, ...]:
    """A number of heads for each stage; ValueError where there is not one for each, or one does not divide."""
    each = (heads,) * len(channels) if isinstance(heads, int) else heads
    if len(each) != len(channels):
        raise ValueError(f"heads={each} gives {len(each)} numbers for {len(channels)} stages")
    for stage, (number, width) in enumerate(zip(each, channels, strict=True)):
        if number < 1 or width % number:
            raise ValueError(f"heads: {number} does not divide the {width} channels of stage {stage}")
    return each
