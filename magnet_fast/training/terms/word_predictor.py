"""Mask Grounding's predictor: a hidden word from the other words, the pixels and where the mask is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer, BertPredictionHeadTransform

from magnet_fast.models.encoders.bert import additive_mask
from magnet_fast.models.position import sine_position


class WordPredictor(nn.Module):
    """Mask encoder, predictor and language head.

    The predictor is a BERT encoder over [words ; pixels ; the mask's token], with padded words really masked. The
    language head is BERT's, its decoder tied to the model's own word embeddings. The sizes of the predictor are
    ovr-cnn's, to which MagNet's author points; that pixels carry a sine position and every kind of token a learned
    embedding is our choice (the mask's token is a place: without positions nothing could relate it to a pixel).

    Args:
        text_width: D, width of the words and of the predictor.
        image_channels: C of the pixels.
        vocab_size: entries of the word embedding.
        layers, heads, feedforward: of the predictor.
    """

    def __init__(
        self,
        text_width: int,
        image_channels: int,
        vocab_size: int,
        *,
        layers: int = 6,
        heads: int = 8,
        feedforward: int = 768,
    ) -> None:
        super().__init__()
        if text_width % heads or text_width % 4:
            raise ValueError(f"text_width={text_width} must be a multiple of 4 and of heads={heads}")
        config = BertConfig(
            hidden_size=text_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=feedforward,
            attn_implementation="sdpa",
        )
        self.text_width = text_width
        self.mask_encoder = nn.Sequential(nn.Linear(2, text_width), nn.ReLU(), nn.Linear(text_width, text_width))
        self.no_mask = nn.Parameter(torch.zeros(text_width))  # stands for the mask of an absent referent
        self.pixel_projection = nn.Linear(image_channels, text_width)
        self.kinds = nn.Parameter(0.02 * torch.randn(3, text_width))  # of words, pixels and the mask
        self.norm = nn.LayerNorm(text_width)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(layers))
        self.transform = BertPredictionHeadTransform(config)
        self.decoder_bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self,
        words: Tensor,
        word_mask: Tensor,
        feature: Tensor,
        mask: Tensor,
        positions: Tensor,
        word_embedding: Tensor,
    ) -> Tensor:
        """Logits of the words at the chosen positions, and there alone: a vocabulary is large.

        Args:
            words: (B, T, D) features of the sentence with hidden words.
            word_mask: (B, T), 1 or True for a word.
            feature: (B, H, W, C) features of the image, exchanged with that sentence.
            mask: (B, H', W') ground truth of the referent, at any size.
            positions: (B, K) int64.
            word_embedding: (V, D), the model's own.

        Returns:
            (B, K, V) logits.
        """
        height, width = feature.shape[1:3]
        place = sine_position(height, width, words.shape[2], words.device, words.dtype)
        pixels = self.pixel_projection(feature.flatten(1, 2)) + place
        parts = [words, pixels, self.encode_mask(mask).to(words.dtype)[:, None]]
        tokens = torch.cat([part + kind for part, kind in zip(parts, self.kinds, strict=True)], dim=1)
        present = F.pad(word_mask.to(torch.int64), (0, tokens.shape[1] - words.shape[1]), value=1)
        hidden = self.norm(tokens)
        padding = additive_mask(present, hidden)
        for layer in self.layers:
            hidden = layer(hidden, padding)
            if isinstance(hidden, tuple):  # transformers' layers returned tuples for a long time
                hidden = hidden[0]
        chosen = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
        return F.linear(self.transform(chosen), word_embedding, self.decoder_bias)

    def encode_mask(self, mask: Tensor) -> Tensor:
        """(B, H, W) masks to a token each (B, D), from the centre of gravity alone, in [0, 1]²."""
        weight = (mask > 0.5).to(torch.float32)
        area = weight.sum(dim=(1, 2))
        height, width = mask.shape[1:]
        y = (torch.arange(height, device=mask.device) + 0.5) / height
        x = (torch.arange(width, device=mask.device) + 0.5) / width
        centre = torch.stack([weight.sum(dim=1) @ x, weight.sum(dim=2) @ y], dim=1) / area.clamp(min=1)[:, None]
        return torch.where(area[:, None] > 0, self.mask_encoder(centre), self.no_mask)
