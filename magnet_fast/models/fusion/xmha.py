"""X-MHA: both directions of cross-modal attention from one similarity.

The MagNet paper's form of the alignment module (Chng et al., CVPR 2024, section 3.2), which takes it from
GLIP's cross-modality multi-head attention (Li et al., CVPR 2022).
"""

from __future__ import annotations

from torch import Tensor, nn

from magnet_fast import ops


class CrossModalityAttention(nn.Module):
    """One level's exchange between pixels (B, P, C) and words (B, T, D).

    S = P W_q (O W_k)ᵀ/√d is computed once; its softmax over words updates the pixels and its softmax over pixels
    updates the words. Both sides are normalised first (LayerNorm, our choice, as in GLIP's implementation of
    pre-norm fusion). Returns (pixel_update (B, P, C), word_update (B, T, D)).

    Args:
        channels: C. text_width: D.
        inner: width of the shared similarity space, a multiple of head_dim.
        head_dim: channels per head.
    """

    def __init__(self, channels: int, text_width: int, *, inner: int, head_dim: int) -> None:
        super().__init__()
        if inner % head_dim:
            raise ValueError(f"inner={inner} must be a multiple of head_dim={head_dim}")
        self.num_heads = inner // head_dim
        self.pixel_norm, self.word_norm = nn.LayerNorm(channels), nn.LayerNorm(text_width)
        self.pixel_query, self.word_key = nn.Linear(channels, inner), nn.Linear(text_width, inner)
        self.pixel_value, self.word_value = nn.Linear(channels, inner), nn.Linear(text_width, inner)
        self.pixel_output, self.word_output = nn.Linear(inner, channels), nn.Linear(inner, text_width)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels, words = self.pixel_norm(pixels), self.word_norm(words)
        pixel_update, word_update = ops.cross_modal_attention(
            self.pixel_query(pixels),
            self.word_key(words),
            self.word_value(words),
            image_value=self.pixel_value(pixels),
            text_mask=word_mask,
            num_heads=self.num_heads,
        )
        return self.pixel_output(pixel_update), self.word_output(word_update)
