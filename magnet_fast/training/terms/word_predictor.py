"""Mask Grounding's predictor: a hidden word from the other words, the pixels and where the mask is."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer, BertPredictionHeadTransform

from magnet_fast.models.encoders.bert import additive_mask
from magnet_fast.models.position import place_code, sine_position

MASK_TOKENS = {"centre": 2, "place": 2, "shape": 5}
"""What a mask's token may know, and from how many numbers it is made."""

_TEMPERATURE = 20.0


class WordPredictor(nn.Module):
    """Mask encoder, predictor and language head.

    The predictor is a BERT encoder over [words ; pixels ; the mask's token], with padded words really masked. The
    language head is BERT's, its decoder tied to the model's own word embeddings. The sizes of the predictor are
    ovr-cnn's, to which MagNet's author points; that pixels carry a sine position and every kind of token a learned
    embedding is our choice (the mask's token is a place: without positions nothing could relate it to a pixel).

    What the mask's token knows of the mask: `centre`, its centre alone [paper]. `place` [our choice]: its centre alone,
    too, to which the code of that place is added, in which pixels say theirs, one that tells places of a picture apart;
    without that the predictor has to learn first which pixel a centre means. `shape` [our choice]: its centre, the
    width, height and area of what it covers, and the mean of its pixels, projected and with their positions, as the
    predictor sees them; 3 D more parameters.

    Args:
        text_width: D, width of the words and of the predictor.
        image_channels: C of the pixels.
        vocab_size: entries of the word embedding.
        layers, heads, feedforward: of the predictor.
        token: "centre", "place" or "shape".
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
        token: Literal["centre", "place", "shape"] = "centre",
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
        if token not in MASK_TOKENS:
            raise ValueError(f"token: expected one of {', '.join(MASK_TOKENS)}, got {token!r}")
        self.text_width, self.token = text_width, token
        numbers = MASK_TOKENS[token]
        self.mask_encoder = nn.Sequential(nn.Linear(numbers, text_width), nn.ReLU(), nn.Linear(text_width, text_width))
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
        if self.token == "place":
            rows, columns = _middles(height, mask).expand(width, -1).T, _middles(width, mask).expand(height, -1)
            place = place_code(rows, columns, words.shape[2], _TEMPERATURE).flatten(0, 1)[None].to(words.dtype)
        else:
            place = sine_position(height, width, words.shape[2], words.device, words.dtype)
        pixels = self.pixel_projection(feature.flatten(1, 2)) + place
        spoken_of = self.encode_mask(mask, pixels.unflatten(1, (height, width))).to(words.dtype)
        parts = [words, pixels, spoken_of[:, None]]
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

    def encode_mask(self, mask: Tensor, pixels: Tensor) -> Tensor:
        """Masks (B, H', W') to a token each (B, D); one that covers nothing to a learned vector of its own.

        Args:
            mask: of any size.
            pixels: (B, H, W, D), projected and with their positions; read for the token `shape`.
        """
        weight = (mask > 0.5).to(torch.float32)
        area = weight.sum(dim=(1, 2))
        columns, rows = weight.sum(dim=1), weight.sum(dim=2)
        height, width = mask.shape[1:]
        y, x = _middles(height, mask), _middles(width, mask)
        # The centre of gravity, in [0, 1]²; sums, for autocast would compute a product in 8 bits.
        numbers = [total.sum(dim=1) / area.clamp(min=1) for total in (columns * x, rows * y)]
        if self.token == "shape":
            numbers += [_extent(columns), _extent(rows), area / (height * width)]
        token = self.mask_encoder(torch.stack(numbers, dim=1))
        if self.token == "place":
            token = token + place_code(numbers[1], numbers[0], self.text_width, _TEMPERATURE)
        if self.token == "shape":
            # A pixel counts by its share of the mask, so that a mask smaller than a pixel has a mean, too.
            share = F.adaptive_avg_pool2d(weight, pixels.shape[1:3]).flatten(1)
            share = share / share.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            token = token + torch.bmm(share[:, None].to(pixels.dtype), pixels.flatten(1, 2))[:, 0]
        return torch.where(area[:, None] > 0, token, self.no_mask)


def _middles(count: int, like: Tensor) -> Tensor:
    """(count,) middles of as many equal parts of [0, 1]."""
    return (torch.arange(count, device=like.device) + 0.5) / count


def _extent(counts: Tensor) -> Tensor:
    """(B, n) covered pixels of columns or rows to the share of these, (B,), from the first that has any to the last."""
    covered = counts > 0
    first, last = covered.to(torch.uint8).argmax(dim=1), covered.flip(1).to(torch.uint8).argmax(dim=1)
    return torch.where(covered.any(dim=1), counts.shape[1] - last - first, 0) / counts.shape[1]
