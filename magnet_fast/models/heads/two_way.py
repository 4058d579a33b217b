"""RISAM's head: SAM's mask decoder with words where SAM has points and boxes.

The decoder is that of Kirillov et al., "Segment Anything", ICCV 2023, appendix A. Stated in what could be read of Zhang
et al., "RISAM" (arXiv 2311.15727): vision-aware words guide the decoder beside the language-aware pixels, and one
multi-modal query token gathers the words and reads the pixels. How is our choice.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from magnet_fast import ops
from magnet_fast.models.attention import Attention
from magnet_fast.models.base import Head
from magnet_fast.models.config import HeadConfig, Shapes, part
from magnet_fast.models.contract import Features, Prediction, Words, changed
from magnet_fast.models.heads.mask_decoder import presence_of
from magnet_fast.models.position import RandomPosition

_ENLARGED = 4


@part
class TwoWayConfig(HeadConfig):
    """SAM's sizes unless said."""

    says_presence: ClassVar[bool] = True

    kind: Literal["two_way"] = "two_way"
    layers: int = Field(2, gt=0)
    num_heads: int = Field(8, gt=0)
    feedforward: int = Field(2048, gt=0)
    words: bool = Field(True, description="words are tokens beside the query; without, it has their mean alone")
    auxiliary: bool = Field(True, description="a prediction after each layer, for deep supervision")

    def pixel_channels(self, shapes: Shapes) -> int:
        return shapes.channels[0] // 8

    def check(self, shapes: Shapes) -> None:
        if len(shapes.channels) != 1 or shapes.strides[0] % _ENLARGED:
            raise ValueError(
                f"head: two_way reads one map of a stride that is a multiple of {_ENLARGED}; this fusion gives strides "
                f"{shapes.strides}"
            )
        width = shapes.channels[0]
        if shapes.tokens[0] != width:
            raise ValueError(f"head: two_way reads tokens of the map's {width} channels; these have {shapes.tokens[0]}")
        if width % 8 or width // 2 % self.num_heads:
            raise ValueError(
                f"head: the map's {width} channels must be a multiple of 8, and half of them one of "
                f"num_heads={self.num_heads}"
            )

    def build(self, shapes: Shapes) -> TwoWay:
        return TwoWay(shapes, self)


class TwoWay(Head):
    """The mask has four times the map's sides, without what lies beyond the image; `pixels` is what it is made of.

    Logits are to be resized without aligned corners, as SAM's.
    """

    says_presence = TwoWayConfig.says_presence

    def __init__(self, shapes: Shapes, config: TwoWayConfig) -> None:
        super().__init__()
        width = shapes.channels[0]
        self.stride = shapes.strides[0] // _ENLARGED
        self.pixel_channels, self.sentence_width = config.pixel_channels(shapes), width
        self.words, self.auxiliary = config.words, config.auxiliary
        self.place = RandomPosition(width)
        self.no_mask = nn.Parameter(torch.zeros(1, width))  # what SAM adds where it is given no earlier mask
        self.query = nn.Parameter(torch.randn(1, width))
        self.sentence = nn.Linear(width, width)
        self.layers = nn.ModuleList(TwoWayLayer(width, config, first=i == 0) for i in range(config.layers))
        self.last_read = ReadPixels(width, config.num_heads)
        self.norm = nn.LayerNorm(width)
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, self.pixel_channels, 2, 2),
            nn.GELU(),
        )
        self.kernel = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, self.pixel_channels),
        )
        self.class_head = nn.Linear(width, 2)  # nothing, something
        nn.init.zeros_(self.sentence.weight)  # the query is SAM's at first
        nn.init.zeros_(self.sentence.bias)

    def forward(self, features: Features) -> Prediction:
        (x,), (words,), mask = features.maps, features.tokens, features.words.mask
        aware = Words(words, mask)
        size = x.shape[1:3]
        pixels, place = x.flatten(1, 2) + self.no_mask, self.place(*size, x)
        tokens = (self.query + self.sentence(aware.sentence))[:, None]
        read = mask.new_ones(mask.shape[0], 1)
        if self.words:
            tokens, read = torch.cat([tokens, words], dim=1), torch.cat([read, mask], dim=1)
        first, earlier = tokens, []
        for layer in self.layers:
            tokens, pixels = layer(tokens, pixels, first, place, read)
            if self.auxiliary:
                enlarged = self.enlarged(pixels, size, features.size)
                earlier.append(self.predict(tokens[:, 0], enlarged))
        tokens = self.norm(tokens + self.last_read(tokens + first, pixels + place, pixels, read))
        enlarged = enlarged if self.auxiliary else self.enlarged(pixels, size, features.size)
        last = self.predict(tokens[:, 0], enlarged)
        return changed(last, earlier=tuple(earlier), pixels=enlarged, words=aware)

    def enlarged(self, pixels: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
        """Pixels (B, P, C) of a map of `size` to (B, C / 8, h, w), a fourth of the map's stride for `image_size`."""
        height, width = (-(-side // self.stride) for side in image_size)
        return self.enlarge(pixels.transpose(1, 2).unflatten(2, size))[..., :height, :width]

    def predict(self, query: Tensor, enlarged: Tensor) -> Prediction:
        """The query (B, C) and enlarged pixels to mask and presence."""
        mask = torch.einsum("bc,bchw->bhw", self.kernel(query), enlarged)
        return Prediction(mask, presence_of(self.class_head(query)), aligned_corners=False)


class TwoWayLayer(nn.Module):
    """Tokens attend to tokens and read pixels, an MLP, pixels read tokens; each post-norm.

    Args:
        width: C of tokens and pixels.
        config: of the head.
        first: the layer in which tokens attend to one another without their positions and without a residual, as SAM's.
    """

    is_repeated_layer = True

    def __init__(self, width: int, config: TwoWayConfig, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attention = Attention(width, config.num_heads, dropout=0.0)
        self.read_pixels = ReadPixels(width, config.num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, config.feedforward), nn.ReLU(), nn.Linear(config.feedforward, width))
        self.read_tokens = ReadTokens(width, config.num_heads)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))

    def forward(
        self, tokens: Tensor, pixels: Tensor, token_place: Tensor, place: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and their positions (B, N, C), pixels (B, P, C) and theirs (P, C), and which tokens are read (B, N):
        tokens and pixels again."""
        allowed = read[:, None, None]
        if self.first:
            tokens = self.norm1(self.self_attention(tokens, tokens, tokens, allowed))
        else:
            placed = tokens + token_place
            tokens = self.norm1(tokens + self.self_attention(placed, placed, tokens, allowed))
        tokens = self.norm2(tokens + self.read_pixels(tokens + token_place, pixels + place, pixels, read))
        tokens = self.norm3(tokens + self.mlp(tokens))
        pixels = self.norm4(pixels + self.read_tokens(pixels + place, tokens + token_place, tokens, read))
        return tokens, pixels


class CrossAttention(nn.Module):
    """Projections to half the width and back."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width // 2) for _ in range(3))
        self.output = nn.Linear(width // 2, width)


class ReadPixels(CrossAttention):
    """Tokens read pixels."""

    def forward(self, tokens: Tensor, keys: Tensor, pixels: Tensor, read: Tensor) -> Tensor:
        """Tokens (B, N, C), keys and values of pixels (B, P, C) and which tokens count (B, N) to (B, N, C)."""
        _, attended = ops.cross_modal_attention(
            None,
            None,
            None,
            text_query=self.query(tokens),
            image_key=self.key(keys),
            image_value=self.value(pixels),
            text_mask=read,
            num_heads=self.num_heads,
        )
        return self.output(attended)


class ReadTokens(CrossAttention):
    """Pixels read tokens."""

    def forward(self, pixels: Tensor, keys: Tensor, tokens: Tensor, read: Tensor) -> Tensor:
        """Pixels (B, P, C), keys and values of tokens (B, N, C) and which are read (B, N) to (B, P, C)."""
        attended, _ = ops.cross_modal_attention(
            self.query(pixels), self.key(keys), self.value(tokens), text_mask=read, num_heads=self.num_heads
        )
        return self.output(attended)
