"""Word-granularity feature modulation: every pixel reads the words, and what it has read scales and shifts it.

In the style of WGFM (PRCV 2020), of which only the abstract is public: all of this is our choice. Like FiLM (Perez et
al., AAAI 2018), with scales and shifts of every pixel's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.base import Fusion
from magnet_fast.models.config import ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.stages import StagesConfig


@part
class WordFilmConfig(StagesConfig):
    """Words enter the stream after the stages that fuse."""

    kind: Literal["word_film"] = "word_film"
    heads: int = Field(1, gt=0, description="of every stage's attention")

    def check(self, image: ImageConfig, text: TextConfig) -> None:
        super().check(image, text)
        for channels in self.channels(image):
            if channels % self.heads:
                raise ValueError(f"fusion.heads={self.heads} does not divide a stage's {channels} channels")

    def build(self, image: ImageConfig, text: TextConfig) -> WordFilmFusion:
        return WordFilmFusion(self, image, text)


class WordFilmFusion(Fusion):
    """A `WordFilm` for each stage that fuses, and a norm of what the head gets."""

    def __init__(self, config: WordFilmConfig, image: ImageConfig, text: TextConfig) -> None:
        super().__init__()
        stages = config.fused(image)
        self.stages = nn.ModuleDict({str(i): WordFilm(image.channels[i], text.width, config.heads) for i in stages})
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(image.channels[i]) for i in stages})

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        if str(i) not in self.stages:
            return Step(None, x, words)
        x = self.stages[str(i)](x, words.features, words.mask)
        return Step(self.norms[str(i)](x), x, words)


class WordFilm(nn.Module):
    """(1 + tanh(scale)) · x + shift; both begin at zero, so that a pretrained encoder begins as it was.

    forward(x (B, H, W, C), words (B, T, D), word_mask (B, T)) returns (B, H, W, C).
    """

    def __init__(self, channels: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(text_width, channels)
        self.value = nn.Linear(text_width, channels)
        self.modulate = nn.Linear(channels, 2 * channels)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        query = self.query(x.flatten(1, 2))
        read, _ = ops.cross_modal_attention(
            query, self.key(words), self.value(words), text_mask=word_mask, num_heads=self.heads
        )
        scale, shift = self.modulate(read).unflatten(1, x.shape[1:3]).chunk(2, dim=-1)
        return (1 + torch.tanh(scale)) * x + shift
