"""Pixel-word attention: how words enter the pixels and pixels the words, in the released models' forms.

PWAM is LAVT's pixel-word attention module (Yang et al., CVPR 2022); MagNet uses it with other normalisations.
Pixels are (B, P, C), words (B, T, D), word masks (B, T) bool with True = a word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._linear import Activation
from .bert import MASKED
from .project import project


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
        self, channels: int, text_width: int, *, num_heads: int = 1, norm: str = "layer", dropout: float = 0.0
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
        vision = self.dropout(project(self.vision, pixels, activation="gelu"))
        # With one head W Σ p v = Σ p (W v): the few words' values are projected instead of the many pixels.
        absorbed = self.num_heads == 1 and words.shape[1] < pixels.shape[1]
        value = self.value(words)
        attended, _ = ops.cross_modal_attention(
            self.query_norm(project(self.query, pixels)),
            self.key(words),
            F.linear(value, self.output.weight) if absorbed else value,
            text_mask=word_mask,  # a masked word is no key, so zeroing its key and value changes nothing
            num_heads=self.num_heads,
            scale=self.scale,
        )
        language = self.output_norm(attended + self.output.bias if absorbed else project(self.output, attended))
        return self.dropout(project(self.mix, vision * language, activation="gelu"))


class TextPWAM(nn.Module):
    """Pixels into words, the text side of the released MagNet: a residual (B, T, D) for the words.

    `masking="correct"` uses the 0/1 word mask everywhere, also in the instance norm over words.
    `masking="released"` does what the released code does with the additive mask it receives: queries are
    multiplied by 0 (words) and -10000 (padding), and every position enters the instance norm.
    """

    def __init__(self, text_width: int, channels: int, *, masking: str) -> None:
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
        correct = self.masking == "correct"
        query = self.query(words)
        if not correct:
            query = query * (~word_mask)[..., None].to(query.dtype) * MASKED
        attend = self._attend_absorbed if correct and self._absorbing_pays(pixels) else self._attend
        attended = attend(query, pixels, word_mask if correct else None)
        seen = self.norm(self.output(attended), word_mask if correct else None)
        vision = project(self.vision, words, activation="gelu")
        return project(self.mix, vision * seen, activation="gelu")

    def _attend(self, query: Tensor, pixels: Tensor, word_mask: Tensor | None) -> Tensor:
        key, value = self.norm(self.key(pixels)), self.norm(self.value(pixels))
        return _words_read_pixels(query, key, value, word_mask, self.scale)

    def _absorbing_pays(self, pixels: Tensor) -> bool:
        # Products a pixel: 2·C·D for projected keys and values; C² for the covariance, and 2·C²·D/P for its diagonals,
        # both in float32, which takes twice as long where all else is of 16 bits.
        # Queries of -10000 (released masking) would amplify the other order of rounding, so that form stays as it is.
        count, channels, width = pixels.shape[1], pixels.shape[2], self.query.out_features
        dearer = 2 if pixels.dtype.itemsize == 2 else 1
        return dearer * channels * (1 + 2 * width / count) < 2 * width

    def _attend_absorbed(self, query: Tensor, pixels: Tensor, word_mask: Tensor | None) -> Tensor:
        """The same, without keys and values for every pixel: there are few words and many pixels.

        With k = W x + b normalised over the pixels, a score q·(k - μ)/σ is ((q/σ) W)·x plus a constant that softmax
        drops; and since probabilities sum to 1, the attended value is W_v (Σ p x - mean x)/σ_v. Only σ is needed, and
        σ² is the diagonal of W Cov(x) Wᵀ.
        """
        dtype = pixels.dtype
        wide = pixels if dtype == torch.float64 else pixels.float()
        centred = wide - wide.mean(dim=1, keepdim=True)
        covariance = centred.transpose(1, 2) @ centred / pixels.shape[1]  # (B, C, C)
        key_scale, value_scale = (
            torch.rsqrt(((weight @ covariance) * weight).sum(-1) + self.norm.eps)[:, None].to(dtype)  # (B, 1, D)
            for weight in (self.key.weight.to(covariance.dtype), self.value.weight.to(covariance.dtype))
        )
        centred = centred.to(dtype)
        read = _words_read_pixels((query * key_scale) @ self.key.weight, centred, centred, word_mask, self.scale)
        return F.linear(read, self.value.weight) * value_scale


def _words_read_pixels(query: Tensor, key: Tensor, value: Tensor, word_mask: Tensor | None, scale: float) -> Tensor:
    """Attention of words (B, T, ·) over pixels (B, P, ·), one head."""
    _, attended = ops.cross_modal_attention(
        None, None, None, text_query=query, image_key=key, image_value=value, text_mask=word_mask, scale=scale
    )
    return attended


class Gate(nn.Module):
    """x + tanh(Linear(act(Linear(r))))·r with bias-free Linears: how much of a residual a stream takes up.

    Starts closed and can learn: the last Linear starts at zero, the first does not. (With both at zero and a
    ReLU between, as released for the text, no gradient ever reaches either.)
    """

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels, bias=False)
        self.activation: Activation = activation
        self.last = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.last.weight)
        self._known: tuple[tuple[int, int], bool] | None = None

    def closed(self) -> bool:
        """Whether the gate surely lets nothing through: its residual then need not be computed in inference.

        Always False while gradients are recorded (a closed gate still learns from its residual) or a graph is traced.
        On a GPU, where looking at the weights waits for the device, the answer is kept until the weights change (or
        `train` or `eval` is called, for changes behind autograd's back).
        """
        weight = self.last.weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return False
        if weight.device.type == "cpu":
            return not (weight[0].any() or weight.any())  # most open gates show it in their first row
        state = (weight.data_ptr(), weight._version)
        if self._known is None or self._known[0] != state:
            self._known = state, not bool(weight.any())
        return self._known[1]

    def train(self, mode: bool = True) -> Gate:
        self._known = None
        return super().train(mode)

    def forward(self, stream: Tensor, residual: Tensor) -> Tensor:
        hidden = project(self.first, residual, activation=self.activation)
        return stream + torch.tanh(project(self.last, hidden)) * residual
