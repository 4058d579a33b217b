"""The Cross-modal Alignment Loss: pixels of what is named resemble each other, and the sentence.

MagNet, section 3.3 (Chng et al., CVPR 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_fast import ops
from magnet_fast.models.contract import Prediction
from magnet_fast.training.terms.mask import mask_at
from magnet_fast.training.terms.term import Term, TermConfig, register


class AlignmentConfig(TermConfig):
    """Temperatures; the paper gives neither, 0.1 is our choice. MagNet's recipes have a weight of 0.5, ours, too."""

    pixel_temperature: float = Field(0.1, gt=0, description="of P2P")
    text_temperature: float = Field(0.1, gt=0, description="of P2T")


@register("alignment")
class AlignmentTerm(Term):
    """P2P + P2T, with the projection of the sentence to the pixels' width.

    Args:
        config: its options.
        sentence_width: D of the sentence.
        pixel_channels: C of the pixels.
    """

    config_class = AlignmentConfig
    logged = ("p2p", "p2t")

    def __init__(self, config: AlignmentConfig, sentence_width: int, pixel_channels: int) -> None:
        super().__init__(config)
        self.temperatures = {
            "pixel_temperature": config.pixel_temperature,
            "text_temperature": config.text_temperature,
        }
        self.projection = nn.Linear(sentence_width, pixel_channels)

    @classmethod
    def build(cls, config: AlignmentConfig, model: nn.Module, tokenizer: Any) -> AlignmentTerm:
        channels = getattr(model.head, "pixel_channels", None)
        if channels is None:
            raise cls.refuse(
                "the model gives no embedding of the pixels to align with the sentence (model.head.pixel_channels)"
            )
        width = getattr(model.head, "sentence_width", None) or model.text_encoder.sentence_width
        return cls(config, width, channels)

    def forward(
        self, prediction: Prediction, batch: dict[str, Any], model: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sentence = self.projection(prediction.words.sentence)
        parts = alignment_loss(prediction.pixels, sentence, batch["mask"], **self.temperatures)
        return parts["p2p"] + parts["p2t"], {name: part.detach() for name, part in parts.items()}


def alignment_loss(
    pixels: Tensor,
    sentence: Tensor,
    mask: Tensor,
    *,
    pixel_temperature: float = 0.1,
    text_temperature: float = 0.1,
) -> dict[str, Tensor]:
    """Pixels against pixels, and pixels against the sentence.

    With z the L2-normalised pixels, t the L2-normalised sentence, + the pixels inside the mask:

        p2p = `ops.pixel_contrastive_loss`
        p2t = mean_{i in +} -log( exp(z_i . t / tau) / (exp(z_i . t / tau) + sum_{k in -} exp(z_k . t / tau)) )

    Args:
        pixels: (B, C, h, w) the embedding of the pixels that the mask is read from, all of them used.
        sentence: (B, C) the projected sentence.
        mask: (B, H, W) ground truth in [0, 1], brought to (h, w) as in `mask_at`; a pixel is inside from one half on.
        pixel_temperature, text_temperature: above 0.

    Returns:
        float32 scalars `p2p` and `p2t`, means over the images. An image whose mask is empty at (h, w) adds 0 to both;
        one whose mask is full, too: without pixels outside there is nothing to tell apart.
    """
    if pixels.dim() != 4 or sentence.shape != pixels.shape[:2]:
        raise ValueError(
            f"sentence: expected batch and channels of pixels {tuple(pixels.shape)}, got {tuple(sentence.shape)}"
        )
    with torch.autocast(pixels.device.type, enabled=False):
        inside = mask_at(mask.to(torch.float32), pixels.shape[-2:]) >= 0.5  # (B, h, w)
        p2p = ops.pixel_contrastive_loss(pixels, inside, temperature=pixel_temperature)
        unit = F.normalize(pixels.float().flatten(2), dim=1, eps=1e-6)  # (B, C, P)
        text = F.normalize(sentence.float(), dim=1, eps=1e-6)
        similarity = torch.einsum("bcp,bc->bp", unit, text) / text_temperature
        inside = inside.flatten(1)
        # The lowest finite number stands for "no pixel outside": softplus of it is exactly 0, and no NaN is made.
        outside = similarity.masked_fill(inside, torch.finfo(similarity.dtype).min).logsumexp(1, keepdim=True)
        # -log(e^s / (e^s + e^o)) = softplus(o - s)
        terms = F.softplus(outside - similarity).masked_fill(~inside, 0.0)
        p2t = terms.sum(1) / inside.sum(1).clamp(min=1)
    return {"p2p": p2p.mean(), "p2t": p2t.mean()}
