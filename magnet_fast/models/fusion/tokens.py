"""RefSegformer's fusion: words go into a few tokens, pixels read the tokens (Wu et al., TIP 2024; there VLTF).

Beside memory tokens, which read the words, stand blank tokens, which read nothing: a place to attend to when no word
fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.attention import TokenAttention
from magnet_fast.models.base import Fusion
from magnet_fast.models.config import FusionConfig, ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.pixel_word import PixelInstanceNorm


@part
class TokensConfig(FusionConfig):
    """Memory and blank tokens after the stages that fuse; the others' outputs are their maps."""

    kind: Literal["tokens"] = "tokens"
    memory: int = Field(20, gt=0, description="tokens that read the words")
    blank: int = Field(10, ge=0, description="tokens that read nothing; 0 where every sentence names something")
    stages: tuple[int, ...] = Field((1, 2, 3), description="that fuse")
    head_dim: int = Field(32, gt=0, description="channels of a head")
    masking: Literal["correct", "released"] = Field(
        "correct", description="padded words are no keys; or keys and values of zeros, as released"
    )

    @model_validator(mode="after")
    def _some_stage(self) -> TokensConfig:
        if not self.stages or sorted(set(self.stages)) != list(self.stages) or self.stages[0] < 0:
            raise ValueError(f"stages={self.stages}; expected some of 0, 1, ... in order, each once")
        return self

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        if self.stages[-1] >= len(image.channels):
            raise ValueError(f"fusion.stages={self.stages}: the image encoder has {len(image.channels)} stages")
        for stage in self.stages:
            if image.channels[stage] % self.head_dim:
                raise ValueError(
                    f"fusion.head_dim={self.head_dim} does not divide the {image.channels[stage]} channels "
                    f"of stage {stage}"
                )

    def tokens(self, image: ImageConfig) -> tuple[int | None, ...]:
        return tuple(width if stage in self.stages else None for stage, width in enumerate(image.channels))

    def build(self, image: ImageConfig, text: TextConfig) -> TokenFusion:
        return TokenFusion(self, image, text)


class TokenFusion(Fusion):
    """A `TokenStage` for each stage that fuses."""

    def __init__(self, config: TokensConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(
            {str(stage): TokenStage(image.channels[stage], text.width, config) for stage in config.stages}
        )

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        if str(i) not in self.stages:
            return Step(x, x, words)
        residual, tokens = self.stages[str(i)](x, words.features, words.mask)
        return Step(residual, x + residual, words, tokens)


class TokenStage(nn.Module):
    """forward(x (B, H, W, C), words (B, T, D), word_mask (B, T)) returns the residual (B, H, W, C) and the tokens
    (B, K + M, C), blank ones first.
    """

    def __init__(self, channels: int, text_width: int, config: TokensConfig) -> None:
        super().__init__()
        heads = channels // config.head_dim
        self.released_masking = config.masking == "released"
        self.memory = nn.Parameter(torch.empty(config.memory, channels))
        self.blank = nn.Parameter(torch.empty(config.blank, channels)) if config.blank else None
        self.pixel_in, self.pixel_in_norm = nn.Linear(channels, channels), nn.BatchNorm1d(channels)
        self.word_in = nn.Linear(text_width, channels)
        self.read_words = TokenAttention(channels, heads)
        self.read_tokens = TokenAttention(channels, heads)
        self.norm = PixelInstanceNorm()
        self.out, self.out_norm = nn.Linear(channels, channels), nn.BatchNorm1d(channels)
        self._initialise()

    def _initialise(self) -> None:
        for weight in (self.memory, self.blank, self.pixel_in.weight, self.word_in.weight, self.out.weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for attention in (self.read_words, self.read_tokens):
            for linear in attention.children():
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.out_norm.weight)  # the stream is the plain encoder's at first

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        batch = x.shape[0]
        pixels = _over_pixels(self.pixel_in_norm, self.pixel_in(x.flatten(1, 2)))
        memory = self.memory.expand(batch, -1, -1)
        tokens = self.read_words(memory, self.word_in(words), word_mask, silenced=self.released_masking)
        if self.blank is not None:
            tokens = torch.cat([self.blank.expand(batch, -1, -1), tokens], dim=1)
        if tokens.shape[1] > 1:  # one token is no statistics
            tokens = self.norm(tokens)
        read = self.norm(self.read_tokens(pixels, tokens))
        residual = _over_pixels(self.out_norm, self.out(read))
        return residual.unflatten(1, x.shape[1:3]), tokens


def _over_pixels(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """BatchNorm over batch and pixels of (B, P, C)."""
    return norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
