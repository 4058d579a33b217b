"""The text encoder: BERT, whole, or in slices between which an image stage can exchange with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import BertConfig as TransformersBertConfig
from transformers import BertModel

from magnet_fast.models.base import TextEncoder
from magnet_fast.models.config import ImageConfig, TextConfig, part
from magnet_fast.models.contract import Text, Words
from magnet_fast.models.files import read_contents
from magnet_fast.models.state import check_complete, load_strictly, unreachable
from magnet_fast.models.wrapping import part_of, unwrap

# The released models add -10000 to padded keys; exp(-10000) is 0 in every dtype used here.
MASKED = -10000.0
SLICES = 4
_PUBLISHED = "bert-base-uncased"


@part
class BertConfig(TextConfig):
    """A BERT encoder; BERT-base unless said."""

    kind: Literal["bert"] = "bert"
    schedule: Literal["whole", "slices"] = Field(
        "whole", description="all layers before the image's stages, or a quarter of them before each exchange"
    )
    vocab_size: int = Field(30522, gt=0)
    hidden_size: int = Field(768, gt=0)
    num_layers: int = Field(12, gt=0)
    num_heads: int = Field(12, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    max_positions: int = Field(512, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @property
    def width(self) -> int:
        return self.hidden_size

    def check(self, image: ImageConfig) -> None:
        if self.schedule == "slices" and len(image.channels) != SLICES:
            raise ValueError(
                f"text.schedule='slices' has a slice for each of {SLICES} stages; the image encoder has "
                f"{len(image.channels)}: use schedule='whole'"
            )

    def build(self) -> BertEncoder:
        return BertEncoder(self)

    @model_validator(mode="after")
    def _divisible(self) -> BertConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        if self.schedule == "slices" and self.num_layers % SLICES:
            raise ValueError(f"num_layers={self.num_layers} must be a multiple of {SLICES}: one slice for each stage")
        return self


class BertEncoder(TextEncoder):
    """transformers' BERT without its pooler, whole or in four slices of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(
            TransformersBertConfig(
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
            ),
            add_pooling_layer=False,
        )
        self.whole = config.schedule == "whole"
        self.layers_per_slice = config.num_layers // SLICES
        self.width, self.vocab_size, self.max_positions = config.hidden_size, config.vocab_size, config.max_positions

    @property
    def word_embedding(self) -> Tensor:
        return self.bert.get_input_embeddings().weight

    def start(self, text: Text, embedded: Tensor | None = None) -> Words:
        given = {"input_ids": text.ids} if embedded is None else {"inputs_embeds": embedded}
        words = Words(self.bert.embeddings(**given), text.mask)
        return self._run(self.bert.encoder.layer, words) if self.whole else words

    def advance(self, i: int, words: Words) -> Words:
        if self.whole:
            return words
        first = i * self.layers_per_slice
        return self._run(self.bert.encoder.layer[first : first + self.layers_per_slice], words)

    def load_pretrained(self, source: str | None) -> None:
        name = source or _PUBLISHED
        what = f"text weights {name!r}"
        if Path(name).is_file():
            load_strictly(self.bert, _bert_alone(unwrap(read_contents(name), what)), what)
            return
        try:
            bert, report = BertModel.from_pretrained(name, add_pooling_layer=False, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise unreachable("text", name, error) from error
        check_complete(report, what)
        load_strictly(self.bert, bert.state_dict(), what)

    def _run(self, layers: nn.ModuleList, words: Words) -> Words:
        hidden = words.features
        mask = additive_mask(words.mask, hidden)
        for layer in layers:
            hidden = layer(hidden, mask)
            if isinstance(hidden, tuple):  # transformers' layers returned tuples for a long time
                hidden = hidden[0]
        return Words(hidden, words.mask)


def additive_mask(mask: Tensor, like: Tensor) -> Tensor:
    """(B, T), 1 or True for a token, to (B, 1, 1, T): 0 for a token, -10000 for padding."""
    return ((1.0 - mask.to(like.dtype)) * MASKED)[:, None, None, :]


def _bert_alone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BERT without pooler and heads; norms were named as in TensorFlow at first."""
    found = part_of(state, "embeddings.word_embeddings.weight")
    names = {name: name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in found}
    return {new: found[old] for old, new in names.items() if not new.startswith(("pooler.", "cls."))}
