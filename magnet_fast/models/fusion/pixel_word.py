"""Pixel-word attention: how words enter the pixels and pixels the words, in the released models' forms.

PWAM is LAVT's pixel-word attention module (Yang et al., CVPR 2022); MagNet uses it with other normalisations.
Pixels are (B, P, C), words (B, T, D), word masks (B, T) bool with True = a word.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnet_fast import ops

_PADDING = -10000.0  # what the released code multiplies and adds where a word is padding


class PixelInstanceNorm(nn.Module):
    """Normalise every channel over the tokens of its image: (B, N, C) → (B, N, C), eps 1e-5, no affine.

    `mask` (B, N) bool restricts both the statistics and the result to the tokens that count (others become 0).
    """

    eps = 1e-5

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if mask is None:
            mean = wide.mean(dim=1, keepdim=True)
            centred = wide - mean
            variance = centred.square().mean(dim=1, keepdim=True)
        else:
            keep = mask[..., None].to(wide.dtype)
            count = keep.sum(dim=1, keepdim=True).clamp(min=1)
            mean = (wide * keep).sum(dim=1, keepdim=True) / count
            centred = (wide - mean) * keep
            variance = centred.square().sum(dim=1, keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)


class PWAM(nn.Module):
    """Words into pixels: (B, P, C) pixels and (B, T, D) words to a multimodal residual (B, P, C).

    Args:
        channels: C.
        text_width: D.
        num_heads: attention heads; the scale is C^-½ (full width) for any number, as released.
        norm: "layer" (MagNet) or "instance" (LAVT) after the query and output projections.
        dropout: after the projected pixels and after the product.
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        *,
        num_heads: int = 1,
        norm: Literal["layer", "instance"] = "layer",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {channels} channels of this level")
        make_norm = {"layer": lambda: nn.LayerNorm(channels), "instance": PixelInstanceNorm}[norm]
        self.num_heads, self.scale = num_heads, channels**-0.5
        self.vision = nn.Linear(channels, channels)
        self.query = nn.Linear(channels, channels)
        self.query_norm = make_norm()
        self.key = nn.Linear(text_width, channels)
        self.value = nn.Linear(text_width, channels)
        self.output = nn.Linear(channels, channels)
        self.output_norm = make_norm()
        self.mix = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        vision = self.dropout(F.gelu(self.vision(pixels)))
        attended, _ = ops.cross_modal_attention(
            self.query_norm(self.query(pixels)),
            self.key(words),
            self.value(words),
            text_mask=word_mask,  # a masked word is no key, so zeroing its key and value changes nothing
            num_heads=self.num_heads,
            scale=self.scale,
        )
        language = self.output_norm(self.output(attended))
        return self.dropout(F.gelu(self.mix(vision * language)))


class TextPWAM(nn.Module):
    """Pixels into words, the text side of the released MagNet: a residual (B, T, D) for the words.

    `masking="correct"` uses the 0/1 word mask everywhere, also in the instance norm over words.
    `masking="released"` does what the released code does with the additive mask it receives: queries are
    multiplied by 0 (words) and -10000 (padding), and every position enters the instance norm.
    """

    def __init__(self, text_width: int, channels: int, *, masking: Literal["correct", "released"]) -> None:
        super().__init__()
        self.masking, self.scale = masking, text_width**-0.5
        self.vision = nn.Linear(text_width, text_width)  # named as in PWAM: here the attending side is the text
        self.query = nn.Linear(text_width, text_width)
        self.key = nn.Linear(channels, text_width)
        self.value = nn.Linear(channels, text_width)
        self.output = nn.Linear(text_width, text_width)
        self.mix = nn.Linear(text_width, text_width)
        self.norm = PixelInstanceNorm()

    def forward(self, words: Tensor, pixels: Tensor, word_mask: Tensor) -> Tensor:
        released = self.masking == "released"
        query = self.query(words)
        if released:
            query = query * (~word_mask)[..., None].to(query.dtype) * _PADDING
        mask = None if released else word_mask
        seen = self.norm(self.output(self.read(query, pixels, mask)), mask)
        return F.gelu(self.mix(F.gelu(self.vision(words)) * seen))

    def read(self, query: Tensor, pixels: Tensor, word_mask: Tensor | None) -> Tensor:
        """What the words' queries (B, T, D) read in the pixels: (B, T, D)."""
        _, attended = ops.cross_modal_attention(
            None,
            None,
            None,
            text_query=query,
            image_key=self.norm(self.key(pixels)),
            image_value=self.norm(self.value(pixels)),
            text_mask=word_mask,
            scale=self.scale,
        )
        return attended


class Gate(nn.Module):
    """x + tanh(Linear(act(Linear(r))))·r with bias-free Linears: how much of a residual a stream takes up.

    Starts closed and can learn: the last Linear starts at zero, the first does not. (With both at zero and a
    ReLU between, as released for the text, no gradient ever reaches either.)
    """

    def __init__(self, channels: int, activation: Literal["gelu", "relu"]) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels, bias=False)
        self.activation = activation
        self.last = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, stream: Tensor, residual: Tensor) -> Tensor:
        activate = {"gelu": F.gelu, "relu": F.relu}[self.activation]
        return stream + torch.tanh(self.last(activate(self.first(residual)))) * residual
