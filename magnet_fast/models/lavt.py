"""LAVT: language-aware Swin stages and a convolutional decoder (Yang et al., CVPR 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bert import BertSlices
from .config import LAVTConfig
from .inputs import check_inputs
from .outputs import SegmentationOutput
from .pwam import PWAM, Gate
from .swin import SwinEncoder


class LanguageFusion(nn.Module):
    """After a stage: a PWAM residual, normed for the decoder and gated into the stream."""

    def __init__(self, channels: int, text_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.fusion = PWAM(channels, text_width, num_heads=num_heads, norm="instance", dropout=dropout)
        self.norm = nn.LayerNorm(channels)
        self.gate = Gate(channels, "relu")

    def forward(self, feature: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """feature (B, H, W, C) → (output for the decoder, stream), both (B, H, W, C)."""
        residual = self.fusion(feature.flatten(1, 2), words, word_mask).unflatten(1, feature.shape[1:3])
        return self.norm(residual), self.gate(feature, residual)


class ConvBlock(nn.Sequential):
    """Twice: convolution 3×3 without bias, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class TopDownDecoder(nn.Module):
    """Stride 32 to 4: resize to the finer map, concatenate, two convolutions; then 2 logits a pixel.

    features are channels-last from stride 4 to 32; the result is (B, 2, H/4, W/4).
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        width = 4 * channels[0]
        coarse, *finer = reversed(channels)
        blocks = []
        for skip in finer:
            blocks.append(ConvBlock(coarse + skip, width))
            coarse = width
        self.blocks = nn.ModuleList(blocks)
        self.classify = nn.Conv2d(width, 2, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x, *finer = (feature.permute(0, 3, 1, 2) for feature in reversed(features))
        for block, skip in zip(self.blocks, finer, strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = block(torch.cat((x, skip), dim=1))
        return self.classify(x)


class LAVT(nn.Module):
    """forward as MagNet's; mask_logits is (B, 2, H, W) over background and referent, class_logits None."""

    def __init__(self, config: LAVTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = SwinEncoder(config.image)
        self.text_encoder = BertSlices(config.text)
        self.fusions = nn.ModuleList(
            LanguageFusion(channels, config.text.hidden_size, heads, config.dropout)
            for channels, heads in zip(config.image.channels, config.fusion_heads, strict=True)
        )
        self.decoder = TopDownDecoder(config.image.channels)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> SegmentationOutput:
        logits, words = self._logits(image, input_ids, attention_mask)
        return SegmentationOutput(_resize(logits, image.shape[-2:]), None, text_features=words)

    def _logits(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(image, input_ids, attention_mask, self.text_encoder)
        outputs, words = self.encode(image, input_ids, attention_mask)
        return self.decoder(outputs), words

    def encode(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Stage outputs, channels-last (B, Hᵢ, Wᵢ, Cᵢ) from stride 4 to 32, and the words (B, T, D)."""
        word_mask = attention_mask.bool()
        words = self.text_encoder(input_ids, attention_mask)
        feature = self.image_encoder.first_stage(image)
        outputs = []
        stages = self.image_encoder.stages
        for index, (stage, fusion) in enumerate(zip(stages, self.fusions, strict=True)):
            output, stream = fusion(feature, words, word_mask)
            outputs.append(output)
            if stage.downsample is not None:
                feature = stages[index + 1](stage.downsample(stream))
        return outputs, words

    @torch.no_grad()
    def predict(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Foreground probability (B, H, W) float32 at `size` (default: the input's); > 0.5 is the argmax."""
        logits, _ = self._logits(image, input_ids, attention_mask)
        return _resize(logits.float(), size or image.shape[-2:]).softmax(dim=1)[:, 1]


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)
