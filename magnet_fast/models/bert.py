"""The text encoder: BERT, run in four slices so that an image stage can be exchanged with between them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from .config import TextEncoderConfig

# The released models add -10000 to padded keys; exp(-10000) is 0 in every dtype used here.
MASKED = -10000.0


class BertSlices(nn.Module):
    """transformers' BERT with its layers grouped in four slices.

    `embed(input_ids)` (B, T) → (B, T, D); `run_slice(i, hidden, additive_mask)` runs slice i, 0…3.
    Only embeddings and layers are used: no pooler.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.bert = BertModel(bert_config(config), add_pooling_layer=False)
        self.layers_per_slice = config.num_layers // 4
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.bert.embeddings(input_ids)

    def run_slice(self, index: int, hidden: Tensor, additive_mask: Tensor) -> Tensor:
        first = index * self.layers_per_slice
        for layer in self.bert.encoder.layer[first : first + self.layers_per_slice]:
            hidden = layer(hidden, additive_mask)
            if isinstance(hidden, tuple):  # transformers' layers returned tuples for a long time
                hidden = hidden[0]
        return hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden state (B, T, D) of all layers: the text side of models without exchanges."""
        hidden = self.embed(input_ids)
        mask = additive_mask(attention_mask, hidden)
        for index in range(4):
            hidden = self.run_slice(index, hidden, mask)
        return hidden


def additive_mask(attention_mask: Tensor, like: Tensor) -> Tensor:
    """(B, T) 0/1 words to (B, 1, 1, T): 0 for a word, -10000 for padding."""
    return ((1.0 - attention_mask.to(like.dtype)) * MASKED)[:, None, None, :]


def bert_config(config: TextEncoderConfig) -> BertConfig:
    """transformers' configuration of our text encoder."""
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        initializer_range=0.02 * (768 / config.hidden_size) ** 0.5,  # BERT's own at its own width
        attn_implementation="sdpa",
    )
