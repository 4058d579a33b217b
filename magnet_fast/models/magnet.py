"""MagNet: image stages and text slices that exchange, and a one-query mask decoder (Chng et al., CVPR 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alignment import build_alignment
from .bert import BertSlices, additive_mask
from .config import MagNetConfig
from .inputs import check_inputs
from .mask_decoder import MaskDecoder
from .outputs import SegmentationOutput
from .pixel_decoder import PixelDecoder
from .swin import SwinEncoder


class MagNet(nn.Module):
    """The released architecture (`alignment.kind="pwam"`) or the paper's (`"xmha"`).

    forward(image (B, 3, H, W) float, ImageNet-normalised; input_ids (B, T) int64; attention_mask (B, T) 0/1)
    returns a `SegmentationOutput` with one prediction and `decoder.mask_layers` auxiliary ones.
    H and W are free: what the strides or windows do not divide is padded inside, and masks have ⌈H/4⌉×⌈W/4⌉.
    """

    def __init__(self, config: MagNetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = SwinEncoder(config.image)
        self.text_encoder = BertSlices(config.text)
        self.alignment = nn.ModuleList(
            build_alignment(config.alignment, stage, channels, config.text.hidden_size)
            for stage, channels in enumerate(config.image.channels)
        )
        self.pixel_decoder = PixelDecoder(config.image.channels, config.decoder)
        self.mask_decoder = MaskDecoder(config.decoder)
        # Projects the mean word feature beside the mask features; only the alignment loss reads it.
        self.text_projection = nn.Linear(config.text.hidden_size, config.decoder.width)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> SegmentationOutput:
        check_inputs(image, input_ids, attention_mask, self.text_encoder)
        features, words = self.encode(image, input_ids, attention_mask)
        levels, mask_features = self.pixel_decoder(features)
        *auxiliary, (mask_logits, class_logits) = self.mask_decoder(levels, mask_features)
        return SegmentationOutput(mask_logits, class_logits, auxiliary, mask_features, words)

    def encode(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Stage outputs, channels-last (B, Hᵢ, Wᵢ, Cᵢ) from stride 4 to 32, and the words (B, T, D)."""
        word_mask = attention_mask.bool()
        feature = self.image_encoder.first_stage(image)
        words = self.text_encoder.embed(input_ids)
        text_mask = additive_mask(attention_mask, words)
        outputs = []
        stages = self.image_encoder.stages
        for index, stage in enumerate(stages):
            words = self.text_encoder.run_slice(index, words, text_mask)
            output, stream, words = self.alignment[index](feature, words, word_mask)
            outputs.append(output)
            if stage.downsample is not None:
                feature = stages[index + 1](stage.downsample(stream))
        return outputs, words

    @torch.no_grad()
    def predict(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Foreground probability (B, H, W) float32 at `size` (default: the input's); the referent is > 0.5.

        As released: mask logits resized bilinearly with aligned corners, softmax(class)[1] · sigmoid(mask).
        """
        output = self(image, input_ids, attention_mask)
        size = tuple(size or image.shape[-2:])
        mask_logits = F.interpolate(output.mask_logits.float(), size=size, mode="bilinear", align_corners=True)
        referent = output.class_logits.float().softmax(dim=-1)[..., 1]
        return (referent[:, :, None, None] * mask_logits.sigmoid())[:, 0]
