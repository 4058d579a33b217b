"""Language-driven attention: what the whole sentence says of channels and of places, apart and then together.

In the style of "Language-driven attention for referring image segmentation" (ICRA 2021), of which only the abstract is
public: the correlation of map and sentence is decoupled into channel attention and spatial attention, which are
integrated. Formulas and sizes are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast.models.base import Fusion
from magnet_fast.models.config import ImageConfig, TextConfig, part
from magnet_fast.models.contract import Step, Words
from magnet_fast.models.fusion.pixel_word import Gate
from magnet_fast.models.fusion.stages import StagesConfig


@part
class LDAConfig(StagesConfig):
    """Language-driven attention after the stages that fuse."""

    kind: Literal["lda"] = "lda"

    def build(self, image: ImageConfig, text: TextConfig) -> LDAFusion:
        return LDAFusion(image, text, self.fused(image))


class LDAFusion(Fusion):
    """An `LDAStage` for each stage that fuses. Of the words the sentence alone is read."""

    def __init__(self, image: ImageConfig, text: TextConfig, stages: tuple[int, ...]) -> None:
        super().__init__()
        last = len(image.channels) - 1
        self.stages = nn.ModuleDict(
            {
                str(stage): LDAStage(image.channels[stage], text.sentence_width, gated=image.in_stream and stage < last)
                for stage in stages
            }
        )

    def forward(self, i: int, x: Tensor, words: Words, carry: None, context: Mapping[str, Tensor]) -> Step:
        if str(i) not in self.stages:
            return Step(None, x, words)
        output, stream = self.stages[str(i)](x, words.sentence)
        return Step(output, stream, words)


class LDAStage(nn.Module):
    """Channels and places that the sentence means, and both at once.

    Args:
        channels: C of the map.
        sentence_width: E of the sentence.
        gated: False where nothing reads the stream; it then passes as it is.
    """

    def __init__(self, channels: int, sentence_width: int, *, gated: bool) -> None:
        super().__init__()
        self.sentence = nn.Linear(sentence_width, channels)
        self.channel_attention = nn.Sequential(
            nn.Linear(2 * channels, max(1, channels // 4)), nn.ReLU(), nn.Linear(max(1, channels // 4), channels)
        )
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(sentence_width, channels)
        self.mix, self.mix_norm = nn.Linear(3 * channels, channels), nn.LayerNorm(channels)
        self.norm = nn.LayerNorm(channels)
        self.gate = Gate(channels, "relu") if gated else None

    def forward(self, x: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, H, W, C), sentence (B, E) → (output for the head, stream), both (B, H, W, C)."""
        image = x.mean(dim=(1, 2))
        channel = self.channel_attention(torch.cat([image, self.sentence(sentence)], dim=-1)).sigmoid()
        channel = channel[:, None, None]  # (B, 1, 1, C)
        key = self.key(sentence)[:, None, None]
        place = (self.query(x) * key).sum(dim=-1, keepdim=True) * x.shape[3] ** -0.5
        place = place.sigmoid()  # (B, H, W, 1)
        joined = torch.cat([x * channel, x * place, x * channel * place], dim=-1)
        residual = F.relu(self.mix_norm(self.mix(joined)))
        return self.norm(residual), x if self.gate is None else self.gate(x, residual)
