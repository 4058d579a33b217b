"""CLIP's text transformer: causal, its sentence the state of the end token (Radford et al., ICML 2021)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from magnet_fast.models.base import TextEncoder
from magnet_fast.models.config import ImageConfig, TextConfig, part
from magnet_fast.models.contract import Text, Words
from magnet_fast.models.encoders.clip_weights import load_clip

_HEAD_DIM = 64
SLICES = 3  # beside the three stages that CLIP's image encoder has here


@part
class ClipTextConfig(TextConfig):
    """The text transformer of CLIP RN50 unless said."""

    kind: Literal["clip_text"] = "clip_text"
    schedule: Literal["whole", "slices"] = Field(
        "whole", description="all layers before the image's stages, or a third of them before each exchange"
    )
    vocab_size: int = Field(49408, gt=0)
    hidden_size: int = Field(512, gt=0)
    num_layers: int = Field(12, gt=0)
    num_heads: int | None = Field(None, gt=0, description="none: of 64 channels each")
    max_positions: int = Field(77, gt=0)
    joint_width: int | None = Field(
        1024,
        gt=0,
        description="channels of the sentence, CLIP's joint space; none: the mean of the words stands for it",
    )

    @model_validator(mode="after")
    def _divisible(self) -> ClipTextConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"num_heads={self.heads} does not divide hidden_size={self.hidden_size}")
        if self.schedule == "slices" and self.num_layers % SLICES:
            raise ValueError(f"num_layers={self.num_layers} must be a multiple of {SLICES}: one slice for each stage")
        return self

    @property
    def heads(self) -> int:
        return self.num_heads or max(1, self.hidden_size // _HEAD_DIM)

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def sentence_width(self) -> int:
        return self.joint_width or self.width

    @property
    def tokenizer(self) -> str:
        return "clip"

    def check(self, image: ImageConfig) -> None:
        if self.schedule == "slices" and len(image.channels) != SLICES:
            raise ValueError(
                f"text.schedule='slices' has a slice for each of {SLICES} stages; the image encoder has "
                f"{len(image.channels)}: use schedule='whole'"
            )

    def build(self) -> ClipText:
        return ClipText(self)


class ClipText(TextEncoder):
    """Whole, or in three slices of layers.

    Words are the last norm's output; the sentence is that of the end token in the joint space, where that is kept. The
    end token is the last that is read. CLIP finds it as the largest id, which with its vocabulary is the same. No
    padding mask: what stands behind the end token is not seen by what stands before it.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.width, self.vocab_size, self.max_positions = config.width, config.vocab_size, config.max_positions
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.randn(config.max_positions, config.width) * 0.01)
        self.layers = nn.ModuleList(ClipLayer(config.width, config.heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.whole, self.layers_per_slice = config.schedule == "whole", config.num_layers // SLICES
        self.text_projection = None
        if config.joint_width is not None:
            self.text_projection = nn.Parameter(torch.randn(config.width, config.joint_width) * config.width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def word_embedding(self) -> Tensor:
        return self.token_embedding.weight

    @property
    def sentence_width(self) -> int:
        return self.width if self.text_projection is None else self.text_projection.shape[1]

    def start(self, text: Text, embedded: Tensor | None = None) -> Words:
        vectors = self.token_embedding(text.ids) if embedded is None else embedded
        words = Words(vectors + self.positions[: text.ids.shape[1]], text.mask)
        return self._finish(self._run(self.layers, words)) if self.whole else words

    def advance(self, i: int, words: Words) -> Words:
        if self.whole:
            return words
        first = i * self.layers_per_slice
        words = self._run(self.layers[first : first + self.layers_per_slice], words)
        return self._finish(words) if i + 1 == SLICES else words

    def _run(self, layers: nn.ModuleList, words: Words) -> Words:
        hidden = words.features
        for layer in layers:
            hidden = layer(hidden)
        return Words(hidden, words.mask)

    def _finish(self, words: Words) -> Words:
        features, mask = self.norm(words.features), words.mask
        if self.text_projection is None:
            return Words(features, mask)
        end = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        last = features[torch.arange(end.shape[0], device=end.device), end]
        return Words(features, mask, last @ self.text_projection)

    def load_pretrained(self, source: str | None) -> None:
        load_clip(self, source, "text", clip_text_names if self.text_projection is not None else _without_projection)


class ClipLayer(nn.Module):
    """Pre-norm causal attention and a feed-forward network with a sigmoid GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        y = self.norm1(x)
        q, k, v = (
            linear(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        y = self.expand(self.norm2(x))
        return x + self.contract(y * torch.sigmoid(1.702 * y))


def clip_text_names(prefix: str) -> list[tuple[str, str]]:
    """Pairs of (CLIP's name after `prefix`, ours below the encoder) as patterns."""
    block = rf"{prefix}transformer\.resblocks\.(\d+)"
    return [
        (rf"{prefix}token_embedding\.weight", "token_embedding.weight"),
        (rf"{prefix}positional_embedding", "positions"),
        (rf"{prefix}ln_final\.(.*)", r"norm.\1"),
        (rf"{prefix}text_projection", "text_projection"),
        (rf"{block}\.attn\.(in_proj_.*)", r"layers.\1.\2"),
        (rf"{block}\.attn\.out_proj\.(.*)", r"layers.\1.output.\2"),
        (rf"{block}\.ln_1\.(.*)", r"layers.\1.norm1.\2"),
        (rf"{block}\.ln_2\.(.*)", r"layers.\1.norm2.\2"),
        (rf"{block}\.mlp\.c_fc\.(.*)", r"layers.\1.expand.\2"),
        (rf"{block}\.mlp\.c_proj\.(.*)", r"layers.\1.contract.\2"),
    ]


def _without_projection(prefix: str) -> list[tuple[str, str]]:
    return [(old, new) for old, new in clip_text_names(prefix) if new != "text_projection"]
